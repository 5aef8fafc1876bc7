"""The table of an evaluation: 80 columns, whether more or less is better, which test, and the number of users."""

import pytest

from perce.measuring.evaluation_report import all_metrics, compare, print_result, summarise

METEOR = "meteor_exact_stem"


def records(users=12, shift=0.0, named=True, turns=1):
    """Two examples per user, with every metric."""
    made = []
    for number in range(2 * users):
        names = ("uses_persona", "uses_another", "reference_uses_persona", "reply_words", "reference_words")
        scores = dict.fromkeys((*names, "rouge1", "rougeL", METEOR), 0.1 + shift / 9)
        losses = {"loss": 30.0, "loss_without": 36.0, "loss_swapped": 33.0, "loss_personal": 9.0, "loss_other": 21.0}
        made.append(
            {"example": number, "key": str(number), "source": f"rows.jsonl:{number // 2}", "tokens": 10,
             "turn": 1 + number % turns,
             "personal_tokens": 3, "personal_mask": "own", "user_id": f"u{number // 2}" if named else None}
            | {name: value + shift + number / 7 for name, value in losses.items()} | scores
        )  # fmt: skip
    return made


@pytest.fixture
def printed(monkeypatch, capsys):
    """What is printed for records if stdout is piped: rich then uses 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def of(ours, theirs=None):
        facts = {"model": "ours"}
        other = {"records": theirs, "run": {"model": "theirs"}} if theirs else None
        comparison = compare(ours, facts, other, "theirs.json") if other else None
        print_result(summarise(ours, [], facts), comparison)
        return capsys.readouterr().out

    return of


@pytest.mark.parametrize("compared", [False, True])
def test_it_fits_80_columns_a_metric_a_line(printed, compared):
    lines = printed(records(), records(shift=0.5) if compared else None).splitlines()
    assert max(map(len, lines)) <= 80
    for label in (metric.label for metric in all_metrics().values()):
        if label != "METEOR":
            tables = 1 + (compared and "reference" not in label)
            assert sum(label in line for line in lines) == tables, label


def test_each_number_says_which_way_is_better(printed):
    out = printed(records())
    words = (
        "↓ loss on personal tokens", "↓ loss on other tokens", "↓ loss with persona", "– loss without persona",
        "– loss with another's persona", "↑ replies that use", "– references that use", "↑ ROUGE-1",
        "↑ METEOR, exact and stem only", "↑ cost of another's persona",
    )  # fmt: skip
    assert all(each in out for each in words)
    assert "↓ lower is better" in out and "↑ higher" in out and "bootstrap" in out and "permutation" not in out
    assert "sign-flip permutation test" in printed(records(), records(shift=1.0))


def test_few_users_are_told_and_what_their_p_can_be(printed):
    assert "only 3 users" in printed(records(3)) and "p cannot" not in printed(records(3))
    assert "p cannot be below 0.25" in printed(records(3), records(3, shift=1.0))
    assert "only 10 users" not in printed(records(10), records(10, shift=1.0))
    assert "only 1 user" in printed(records(1)) and "one user" in printed(records(1))


def test_users_are_few_where_a_metric_has_few(printed):
    """Of twelve users three have personal tokens."""
    ours, theirs = records(), records(shift=1.0)
    for record in [*ours[6:], *theirs[6:]]:
        record |= {"personal_tokens": 0, "loss_personal": 0.0}
    assert "only 3 users (loss on personal tokens)" in printed(ours)
    assert "only 3 users (loss on personal tokens): intervals are rough, and p cannot be below 0.25" in " ".join(
        printed(ours, theirs).split()
    )


def test_the_bound_of_p_is_that_of_the_differences(printed):
    """Of twelve users three have a loss with another's persona, and the other result has none."""
    ours, theirs = records(), records(shift=1.0)
    for record in [*ours[6:], *theirs]:
        record |= {"loss_swapped": None}
    out = printed(ours, theirs)
    assert "only 3 users (loss with another's persona): intervals are rough;" in " ".join(out.split())
    for record in theirs[8:]:
        record |= {"personal_tokens": 0, "loss_personal": 0.0}
    for record in ours[8:]:
        record |= {"personal_tokens": 0, "loss_personal": 0.0}
    assert "are rough, and p cannot be below 0.12;" in " ".join(printed(ours, theirs).split())


def test_intervals_stay_within_what_a_metric_can_be(printed):
    ours, theirs = records(2), records(2)
    for place, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        mine |= {"uses_persona": float(place > 0), "rougeL": place / 3, "loss": 9.0 * (place > 1)}
        its |= {"uses_persona": 0.0, "rougeL": 0.0, "loss": 20.0 * (place > 1)}
    metrics = summarise(ours, [], {})["metrics"]
    assert metrics["uses_persona"]["low"] == 0 and metrics["uses_persona"]["high"] == 1
    assert metrics["rougeL"]["low"] == 0 and metrics["loss_with_persona"]["low"] == 0
    differences = compare(ours, {}, {"records": theirs, "run": {}}, "theirs.json")["differences"]
    assert differences["uses_persona"]["high"] == 1 and differences["loss_with_persona"]["low"] < -1


def test_examples_that_one_side_lacks_are_in_no_comparison():
    ours, theirs = records(), records(shift=0.5)
    ours[0] |= {"loss_swapped": None}
    theirs[1] |= {"loss_swapped": None}  # of as many tokens
    found = compare(ours, {}, {"records": theirs, "run": {}}, "theirs.json")["differences"]["loss_swapped_persona"]
    assert found["n"] == 22 and found["value"] == pytest.approx(-0.05)


def test_metrics_of_other_tokens_are_not_compared_and_named(printed):
    ours, theirs = (records() for _ in range(2))
    for record in theirs[:5]:
        record |= {"personal_mask": "another", METEOR: None}
    for record in theirs:
        record |= {"rougeL": None}
    comparison = compare(ours, {}, {"records": theirs, "run": {}}, "theirs.json")
    other = "5 of 24 examples have other personal tokens in the other result"
    alone = "no example has it in both results"
    assert comparison["left_out"] == {"loss_personal_tokens": other, "loss_other_tokens": other, "rougeL": alone}
    assert not comparison["left_out"].keys() & comparison["differences"].keys()
    assert comparison["differences"].keys() >= {"loss_with_persona", METEOR}
    out = printed(ours, theirs)
    assert f"not compared: loss on personal tokens, because {other}\n" in out and "not compared: ROUGE-L" in out
    theirs[0]["tokens"] += 1
    left_out = compare(ours, {}, {"records": theirs, "run": {}}, "theirs.json")["left_out"]
    assert left_out["swap_cost"] == "1 of 24 examples have another number of tokens in the other result"


def test_rows_are_not_called_users(printed):
    out = printed(records(3, named=False), records(3, shift=1.0, named=False))
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
