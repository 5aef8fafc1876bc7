"""Comparisons of results: differences and spreads against a computation by hand, what is left out, what is said."""

import json
from itertools import product

import numpy as np
import pytest

from perce.errors import UserError
from perce.measuring.comparison import check_same, compare, print_comparison, print_means, read_result, users_of
from perce.measuring.evaluation_report import FORM, all_metrics
from tests.helpers.evaluated import METEOR, records


def side(**each):
    """A side of results with these records, by name."""
    return {name: {"records": own, "run": {"model": f"runs/{name}", "seed": 42}} for name, own in each.items()}


@pytest.fixture
def printed(monkeypatch, capsys):
    """What is printed for records if stdout is piped: rich then uses 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def of(a, b, means=False):
        comparison = compare(a if isinstance(a, dict) else side(ours=a), b if isinstance(b, dict) else side(theirs=b))
        if means:
            print_means(comparison)
        print_comparison(comparison)
        return capsys.readouterr().out

    return of


def in_one_line(text):
    return " ".join(text.split())


def three_runs():
    """Two results of A and three of B, of four users, whose losses and weights differ."""
    made = []
    for number in range(5):
        own = records(4, shift=number / 10)
        for place, record in enumerate(own):
            record |= {"loss_personal": (7.0 + number) * ((place + number) % 3), "personal_tokens": 1 + place % 3}
        made.append(own)
    return side(a0=made[3], a1=made[1]), side(b0=made[0], b1=made[2], b2=made[4])


def test_the_numbers_are_those_of_a_computation_by_hand():
    a, b = three_runs()
    found = compare(a, b)["differences"]["loss_personal_tokens"]
    losses = [np.array([record["loss_personal"] for record in x["records"]]) for x in (*a.values(), *b.values())]
    tokens = np.array([record["personal_tokens"] for record in a["a0"]["records"]])
    means = [loss.sum() / tokens.sum() for loss in losses]
    assert found["means"] == [pytest.approx(means[:2]), pytest.approx(means[2:])]
    difference = (losses[0] + losses[1]) / 2 - (losses[2] + losses[3] + losses[4]) / 3
    assert found["value"] == pytest.approx(difference.sum() / tokens.sum())
    assert found["value"] == pytest.approx(np.mean(means[:2]) - np.mean(means[2:]))
    pairs = [mine - its for mine, its in product(means[:2], means[2:])]
    assert found["pairs"] == pytest.approx([min(pairs), max(pairs)])
    sums = np.abs(difference.reshape(4, 2).sum(1) @ np.array([*product([-1, 1], repeat=4)]).T)  # all flips of users
    exact = np.mean(sums >= abs(difference.sum()) - 1e-9)
    assert found["p"] == pytest.approx(exact, abs=0.03) and found["n"] == 8 and found["clusters"] == 4


def test_one_result_a_side_is_compared_as_it_is():
    ours, theirs = records(), records(shift=0.5)
    one = compare(side(a=ours), side(b=theirs))["differences"]
    twice = compare(side(a=ours, a1=ours), side(b=theirs, b1=theirs))["differences"]
    for name, found in one.items():
        assert found["value"] == pytest.approx(found["pairs"][0]) == pytest.approx(found["pairs"][1])
        assert [twice[name][key] for key in ("low", "high", "p")] == [found[key] for key in ("low", "high", "p")]


def test_what_differs_by_rounding_alone_does_not_differ():
    """The mean of three times 0.1 is not 0.1 in floating point."""
    assert np.mean([0.1] * 3) != 0.1
    thrice = side(**{f"a{i}": records() for i in range(3)})
    for found in compare(thrice, side(b=records()))["differences"].values():
        assert found["value"] == 0 and found["p"] == 1


@pytest.mark.parametrize("count", [1, 2])
def test_it_fits_80_columns_a_metric_a_line(printed, count):
    a = side(**{f"a{i}": records(shift=80 + i / 9) for i in range(count)})  # losses of 11
    b = side(**{f"b{i}": records(shift=80.5 + i / 9) for i in range(count)})
    for result in b.values():
        for record in result["records"]:
            record |= {"loss_swapped": record["loss"] - 1}  # a negative cost of another's persona
    for result in (*a.values(), *b.values()):
        for record in result["records"]:
            record |= {"reply_words": 1234 + record["loss"] / 3}
    lines = printed(a, b, means=True).splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    assert next(line for line in lines if "words per reply" in line).split()[4].startswith("1271.")
    for label in (metric.label for metric in all_metrics().values()):
        if label != "METEOR":
            assert sum(label in line for line in lines) == (0 if "reference" in label else 2), label


def test_the_means_of_each_side_are_shown_with_their_range(printed):
    (line,) = [x for x in printed(*three_runs(), means=True).splitlines() if "ROUGE-1" in x and "+" not in x]
    low, high = (0.1 + shift / 90 for shift in (1, 3))
    assert line.split()[2:5] == [f"{(low + high) / 2:.4f}", f"{low:.4f}", f"{high:.4f}"]
    out = printed(side(ours=records()), three_runs()[1], means=True)
    assert out.splitlines()[0].split() == "mean, over results A B min max".split()


def test_whether_the_results_of_the_sides_are_apart(printed):
    a, b = three_runs()
    lines = printed(a, b).splitlines()
    assert next(x for x in lines if "ROUGE-1" in x).split()[-1] == "no"
    assert "differ, this happens in 20 % of cases" in in_one_line(" ".join(lines))
    above = side(**{name: records(4, shift=9.0 + i) for i, name in enumerate(a)})
    for one, other in ((above, b), (b, above)):
        lines = printed(one, other).splitlines()
        assert next(x for x in lines if "ROUGE-1" in x).split()[-1] == "yes"


def test_what_interval_and_p_are_of_is_told_and_what_is_unknown(printed):
    (a, b), out = three_runs(), printed(records(), records(shift=1.0))
    assert "they tell how users differ, not seeds" in out and "sign-flip permutation test" in out
    assert "take it as not shown" in out
    assert "one model a side: what other seeds would give is unknown" in out and "apart" not in out
    assert "apart" in printed(a, b) and "unknown" not in printed(a, b)
    out = printed(side(ours=records(4)), b)
    assert "apart: each result" in out and "A is one result: its spread over seeds is unknown" in out
    assert "B is one result" in printed(b, side(ours=records(4))) and "A: b0, of runs/b0" in printed(b, a)


def test_few_users_are_told_and_what_their_p_can_be(printed):
    assert "p cannot be below 0.25" in printed(records(3), records(3, shift=1.0))
    assert "only 10 users" not in printed(records(10), records(10, shift=1.0))
    ours, theirs = records(), records(shift=1.0)
    for record in [*ours[6:], *theirs[6:]]:
        record |= {"personal_tokens": 0, "loss_personal": 0.0}
    told = "only 3 users (loss on personal tokens): intervals are rough, and p cannot be below 0.25"
    assert told in in_one_line(printed(ours, theirs))


def test_the_bound_of_p_is_that_of_the_differences(printed):
    """Of twelve users three have a loss with another's persona, and the other result has none."""
    ours, theirs = records(), records(shift=1.0)
    for record in [*ours[6:], *theirs]:
        record |= {"loss_swapped": None}
    assert "p cannot be below" not in printed(ours, theirs)
    for record in [*theirs[8:], *ours[8:]]:
        record |= {"personal_tokens": 0, "loss_personal": 0.0}
    assert "are rough, and p cannot be below 0.12;" in in_one_line(printed(ours, theirs))


def test_rows_are_not_called_users(printed):
    out = printed(records(3, named=False), records(3, shift=1.0, named=False))
    assert "only 3 rows" in out and "by row" in out and "user" not in out
    assert "one row" in printed(records(1, named=False), records(1, named=False))


def test_differences_stay_within_what_a_metric_can_be():
    ours, theirs = records(2), records(2)
    for place, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        mine |= {"uses_persona": float(place > 0), "loss": 9.0 * (place > 1)}
        its |= {"uses_persona": 0.0, "loss": 20.0 * (place > 1)}
    differences = compare(side(a=ours), side(b=theirs))["differences"]
    assert differences["uses_persona"]["high"] == 1 and differences["loss_with_persona"]["low"] < -1


def test_examples_that_one_result_lacks_are_in_no_comparison():
    ours, theirs = records(), records(shift=0.5)
    ours[0] |= {"loss_swapped": None}
    theirs[1] |= {"loss_swapped": None}  # of as many tokens
    found = compare(side(a=records(), a1=ours), side(b=theirs))["differences"]["loss_swapped_persona"]
    assert found["n"] == 22 and found["value"] == pytest.approx(-0.05)


@pytest.mark.parametrize("place", [0, 1])
def test_metrics_of_other_tokens_are_not_compared_and_named(printed, place):
    """They are other tokens in a result of the other side, or of the same."""
    ours, theirs = (records() for _ in range(2))
    for record in theirs[:5]:
        record |= {"personal_mask": "another", METEOR: None}
    for record in theirs:
        record |= {"rougeL": None}
    sides = (side(a=ours), side(b=theirs)) if place else (side(a=ours, a1=theirs), side(b=ours))
    comparison = compare(*sides)
    other = "5 of 24 examples have other personal tokens in another result"
    alone = "no example has it in every result"
    of_kinds = "loss_personal_tokens", "loss_other_tokens", "swap_cost_other"
    assert comparison["left_out"] == dict.fromkeys(of_kinds, other) | {"rougeL": alone}
    assert not comparison["left_out"].keys() & comparison["differences"].keys()
    assert comparison["differences"].keys() >= {"loss_with_persona", METEOR}
    out = printed(*sides)
    assert f"not compared: loss on personal tokens, because {other}\n" in out and "not compared: ROUGE-L" in out
    theirs[0]["tokens"] += 1
    left_out = compare(*sides)["left_out"]
    assert left_out["swap_cost"] == "1 of 24 examples have another number of tokens in another result"


def test_other_facts_that_differ_are_named_by_result(printed):
    a, b = side(a0=records(), a1=records()), side(b0=records())
    a["a1"]["run"] |= {"seed": 7, "weights": "another", "batch_size": 1, "streaming": True}
    b["b0"]["run"] |= {"weights": "a third"}
    assert compare(a, b)["settings"] == {"seed": {"a0": 42, "a1": 7, "b0": 42}}
    assert "not only the model differs: seed is 42 in a0, b0 and 7 in a1" in printed(a, b)


def test_other_examples_are_refused():
    ours = {"records": records(2)}
    check_same(users_of(ours), users_of(ours), "--x a.json")
    with pytest.raises(UserError, match=r"^--x a.json: 2 of 4 examples are in one result only"):
        check_same(users_of(ours), users_of({"records": ours["records"][:2]}), "--x a.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read as a result of perce.evaluate"),
        ("no JSON", "cannot be read as a result of perce.evaluate"),
        ('{"kind": "perce.plan", "run": {}, "records": []}', "expected the JSON that perce.evaluate --output writes"),
        ("[]", "expected the JSON that perce.evaluate --output writes"),
        ('{"kind": "perce.evaluate", "run": {"form": 0}, "records": []}', "was written by another version of perce"),
        ('{"kind": "perce.evaluate", "run": [], "records": []}', "expected the JSON that perce.evaluate --output"),
        ('{"kind": "perce.evaluate", "run": {}, "records": null}', "expected the JSON that perce.evaluate --output"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_result("--x", str(path))
    assert str(caught.value).startswith(f"--x {path}: {words}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda record: record.pop("key"), "KeyError('key')"),
        (lambda record: record.pop("tokens"), "KeyError('tokens')"),
        (lambda record: record.update(loss=None), "TypeError"),
        (lambda record: record.update(loss="x"), "ValueError"),
        (lambda record: record.update(key=[]), "TypeError"),
    ],
)
def test_a_record_that_was_damaged_is_named(tmp_path, damage, reason):
    result = {"kind": "perce.evaluate", "run": {"form": FORM}, "records": records(2)}
    damage(result["records"][1])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(result))
    with pytest.raises(UserError) as caught:
        read_result("--x", str(path))
    told = str(caught.value)
    assert told.startswith(f"--x {path}: record 2 is not as perce.evaluate writes it ({reason}") and "again" in told


def test_a_result_is_read(tmp_path):
    result = {"kind": "perce.evaluate", "run": {"form": FORM}, "records": []}
    (tmp_path / "a.json").write_text(json.dumps(result))
    assert read_result("--x", str(tmp_path / "a.json")) == result
