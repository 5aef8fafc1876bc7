"""The table of an evaluation: 80 columns, whether more or less is better, and the number of users."""

import pytest

from perce.measuring.evaluation_report import all_metrics, print_result, quoting, summarise
from tests.helpers.evaluated import records


@pytest.fixture
def printed(monkeypatch, capsys):
    """What is printed for records if stdout is piped: rich then uses 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def of(ours):
        print_result(summarise(ours, [], {"model": "ours"}))
        return capsys.readouterr().out

    return of


def test_it_fits_80_columns_a_metric_a_line(printed):
    lines = printed(records()).splitlines()
    assert max(map(len, lines)) <= 80
    for label in (metric.label for metric in all_metrics().values()):
        if label != "METEOR":
            assert sum(label in line for line in lines) == 1, label


def test_each_number_says_which_way_is_better(printed):
    out = printed(records())
    words = (
        "↓ loss on personal tokens", "↓ loss on other tokens", "↓ loss with persona", "– loss without persona",
        "– loss with another's persona", "– replies that use", "– references that use", "↑ ROUGE-1",
        "↑ METEOR, exact and stem only", "↑ cost of another's persona", "↑ another's cost, other tokens",
    )  # fmt: skip
    assert all(each in out for each in words)
    assert "↓ lower is better" in out and "↑ higher" in out and "bootstrap" in out and "permutation" not in out


def test_few_users_are_told(printed):
    assert "only 3 users" in printed(records(3)) and "p cannot" not in printed(records(3))
    assert "only 10 users" not in printed(records(10))
    assert "only 1 user" in printed(records(1)) and "one user" in printed(records(1))


def test_users_are_few_where_a_metric_has_few(printed):
    """Of twelve users three have personal tokens."""
    ours = records()
    for record in ours[6:]:
        record |= {"personal_tokens": 0, "loss_personal": 0.0}
    assert "only 3 users (loss on personal tokens): intervals are rough;" in " ".join(printed(ours).split())


def test_intervals_stay_within_what_a_metric_can_be(printed):
    ours = records(2)
    for place, mine in enumerate(ours):
        mine |= {"uses_persona": float(place > 0), "rougeL": place / 3, "loss": 9.0 * (place > 1)}
    metrics = summarise(ours, [], {})["metrics"]
    assert metrics["uses_persona"]["low"] == 0 and metrics["uses_persona"]["high"] == 1
    assert metrics["rougeL"]["low"] == 0 and metrics["loss_with_persona"]["low"] == 0


def test_rows_are_not_called_users(printed):
    out = printed(records(3, named=False))
    assert "only 3 rows" in out and "by row" in out and "user" not in out
    assert "one row" in printed(records(1, named=False))


def test_conversations_are_told_turn_by_turn(printed):
    ours = records(turns=2)
    for record in ours:
        record |= {"loss": 10.0 * record["turn"], "loss_without": 25.0, "uses_persona": float(record["turn"] == 2)}
    lines = [line.split() for line in printed(ours).splitlines()]
    at = lines.index("turn with persona without gain replies use it examples".split())
    assert lines[at + 1 : at + 3] == [["1", "1.0000", "2.5000", "1.5000", "0.0000", "12"],
                                      ["2", "2.0000", "2.5000", "0.5000", "1.0000", "12"]]  # fmt: skip
    result = summarise(ours, [], {})
    assert [*result["by_turn"]] == [1, 2] and result["by_turn"][2]["loss_with_persona"]["clusters"] == 12
    assert summarise(records(), [], {})["by_turn"] == {} and "turn" not in printed(records())


def test_replies_to_rows_without_a_response(printed):
    ours = [record | {"uses_persona": 1.0} for record in records()]
    for record in ours[:4]:
        record |= {name: None for name in record if name.startswith(("loss", "reference", "rouge", "meteor"))}
    metrics = summarise(ours, [], {})["metrics"]
    assert metrics["uses_persona"]["n"] == 24 and metrics["loss_with_persona"]["n"] == metrics["rougeL"]["n"] == 20
    assert printed(ours) and "only 12 users" not in printed(ours)


def test_replies_that_quote_more_than_the_users_do_are_told():
    """As PerCE's on tweets: 54 % instead of 23 %. By chance, less often, or of rows without a response: nothing."""

    def of(replies, references):
        pairs = enumerate(zip(replies, references, strict=True))
        return [{"user_id": f"u{i}", "uses_persona": ours, "reference_uses_persona": its} for i, (ours, its) in pairs]

    much, few = [True] * 15 + [False] * 5, [True] * 5 + [False] * 15
    (note,) = quoting(of(much, few))
    assert "75.0 % of the replies use the persona, and 25.0 % of the references" in note and "--clip_max 2" in note
    assert quoting([record | {"user_id": "a"} for record in of(much, few)]) == [], "one user's replies are no sample"
    for replies, references in (
        (few, much),
        (few, few),
        (few, [True] * 4 + [False] * 16),
        (much, [None] * 20),
        ((), ()),
    ):
        assert quoting(of(replies, references)) == []
    assert quoting([{"user_id": "a", "loss": 1.0}]) == []
