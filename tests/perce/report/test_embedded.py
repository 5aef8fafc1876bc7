"""What a page embeds decodes to what was scored."""

import base64
import json
import math
import random
import zlib

import pytest

from perce.report.embedded import embedded
from perce.report.heatmap import ScoredResponse, ScoredToken

CLIP = (0.8, 5.0)


def decoded(responses, signal="PIR", clip=CLIP):
    return json.loads(zlib.decompress(base64.b64decode(embedded(responses, signal, clip, {}))))


def random_tokens(n, clip, seed=0):
    rng, found = random.Random(seed), []
    for _ in range(n):
        logp, logp_cf, signal = -rng.expovariate(0.4), -rng.expovariate(0.3), rng.gauss(1, 4)
        weight = min(max(signal, clip[0]), clip[1])
        found.append(ScoredToken(rng.choice(["a", " be", "🐝", "\n", "é"]), logp, logp_cf, signal, weight))
    return found


@pytest.mark.parametrize("clip", [CLIP, (0.0, 1.0), (0.0, 0.004), (0.999, 1.004), (2.0, 2.0), (0.0, 200.0)])
def test_numbers_come_back_within_half_a_unit(clip):
    tokens = random_tokens(300, clip)
    content = decoded([ScoredResponse((), (), {"only": tokens})], "entropy", clip)
    (found,), unit = content["responses"][0]["passes"], content["unit"]
    assert unit <= 0.01 and (clip[1] == clip[0] or (clip[1] - clip[0]) / unit >= 99)
    for name, one, values in (
        ("logp", 0.01, [t.logp for t in tokens]), ("cf", 0.01, [t.logp_cf for t in tokens]),
        ("weight", unit, [t.token_weight for t in tokens]), ("signal", unit, [t.signal for t in tokens]),
    ):  # fmt: skip
        assert [x * one for x in found[name]] == pytest.approx(values, abs=0.5001 * one), name
    low, high = clip
    ends = [
        "" if low == high else "c" if t.token_weight == high else "f" if t.token_weight == low else "" for t in tokens
    ]
    assert found["ends"] == "".join(end or "-" for end in ends)
    assert found["loss"] == pytest.approx(-sum(t.logp for t in tokens) / 300, abs=1e-4)
    assert found["pir"] == pytest.approx(sum(t.logp - t.logp_cf for t in tokens) / 300, abs=1e-4)


def test_rounding_puts_no_token_at_an_end():
    tokens = [ScoredToken("a", -1.0, -6.0, w, w) for w in (4.9999, 5.0, 0.8001, 0.8, math.nan)]
    (found,) = decoded([ScoredResponse((), (), {"p": tokens})])["responses"][0]["passes"]
    assert found["weight"] == [500, 500, 80, 80, None] and found["ends"] == "-c-f-"


def test_texts_are_shared_and_cut_as_javascript_counts():
    tokens = [ScoredToken(text, -1.0, -2.0, 1.0, 1.0) for text in ("🐝", "", "é\n", "\x1b", "\ud83d")]
    content = decoded(
        [ScoredResponse(("I ski.", "I ski."), (("user", "Hi"),), {"a": tokens, "b": tokens, "c": tokens[:1]}, "u"),
         ScoredResponse(("I ski.",), (("user", "Hi"),), {"b": []}, "u", "rows.jsonl:2")]
    )  # fmt: skip
    first, second = content["responses"]
    assert first["texts"] == [["🐝é\n\\x1b\\ud83d", [2, 0, 2, 4, 6]], ["🐝", [2]]]
    assert [own["text"] for own in first["passes"]] == [0, 0, 1]
    assert second["passes"][0] is second["passes"][2] is None and second["passes"][1]["loss"] is None
    assert content["strings"] == ["I ski.", "Hi"] and content["users"] == ["u"]
    assert first["persona"] == [0, 0] and second["turns"] == [["user", 1]] and second["source"] == "rows.jsonl:2"


def test_a_signal_is_embedded_unless_it_is_pir_and_what_is_no_number_is_null():
    tokens = [ScoredToken("a", -math.inf, -1.0, math.inf, math.nan)]
    (found,) = decoded([ScoredResponse((), (), {"p": tokens})], "exp(PIR)")["responses"][0]["passes"]
    assert found["logp"] == found["weight"] == found["signal"] == [None] and found["cf"] == [-100]
    assert found["loss"] is None
    assert "signal" not in decoded([ScoredResponse((), (), {"p": tokens})])["responses"][0]["passes"][0]


def test_the_same_responses_give_the_same_text():
    responses = [ScoredResponse(("I ski.",), (), {"p": random_tokens(50, CLIP)}, "u")]
    assert embedded(responses, "PIR", CLIP, {}) == embedded(responses, "PIR", CLIP, {})
