"""Scores compared with their reference packages; intervals and identification compared with brute force."""

import random
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from perce.measuring import metrics
from perce.measuring.metrics import clustered_mean, identification, paired_difference, rouge
from tests.helpers.tiny import demo_examples


def text_pairs(count):
    """Pairs of a reply and the same reply with words dropped, doubled and moved."""
    rng = random.Random(0)
    pairs = []
    for example in demo_examples(count):
        words = [word for word in example.response.split() for _ in range(rng.choice([0, 1, 1, 1, 2]))]
        cut = rng.randrange(len(words) + 1)
        pairs.append((" ".join(words[cut:] + words[:cut]), example.response))
    return pairs


def test_rouge_is_the_packages_on_fifty_pairs():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    for prediction, reference in text_pairs(50):
        expected = scorer.score(target=reference, prediction=prediction)
        for name in ("rouge1", "rougeL"):
            assert rouge(name)(prediction, reference) == expected[name].fmeasure


LETTERS = (  # (a reply, another, ROUGE-1 of the two)
    ("Я держу пчёл", "Мы держим пчёл", 1 / 3),
    ("größe", "gräße", 0.0),
    ("caf\u00e9", "cafe\u0301", 1.0),
    ("मैं हिन्दी बोलता हूँ", "मैं उर्दू बोलता हूँ", 3 / 4),
    ("我养蜜蜂。", "我养鸡。", 2 * 2 / (4 + 3)),
    ("蜂を飼う", "蜂と飼う", 3 / 4),
)


@pytest.mark.parametrize(("reply", "other", "expected"), LETTERS)
def test_letters_of_all_scripts_are_read(reply, other, expected):
    """Those of scripts without spaces between words, one by one."""
    pytest.importorskip("rouge_score")
    assert rouge("rouge1")(reply, other) == pytest.approx(expected)
    assert rouge("rougeL")(reply, reply) == 1.0


def test_meteor_reads_scripts_without_spaces_by_character():
    pytest.importorskip("nltk")
    (meteor,) = [scorer for name, scorer in metrics.reply_scorers().items() if name.startswith("meteor")]
    assert meteor("我养了很多蜜蜂", "我养了很多蜜蜂") > 0.99
    assert 0.3 < meteor("我养了很多蜜蜂", "我养了很多鸡") < 0.95


@pytest.mark.parametrize("installed", [True, False])
def test_meteor_is_nltks_on_fifty_pairs(monkeypatch, installed):
    nltk = pytest.importorskip("nltk")
    from nltk.tokenize.punkt import PunktSentenceTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    wordnet = metrics._find_wordnet()
    if installed and wordnet is None:
        pytest.skip("WordNet is not installed (apt-get install wordnet-base)")
    if not installed:
        monkeypatch.setattr(metrics, "_find_wordnet", lambda: None)
        wordnet = SimpleNamespace(synsets=lambda word: [])
    assert metrics.meteor(not installed) is None
    meteor = metrics.meteor(installed)
    # word_tokenize, without the abbreviations of English that it would have to download
    monkeypatch.setattr(nltk.tokenize, "sent_tokenize", lambda text, _: PunktSentenceTokenizer().tokenize(text))
    tokenize = nltk.tokenize.word_tokenize
    for prediction, reference in text_pairs(50):
        expected = single_meteor_score(tokenize(reference), tokenize(prediction), wordnet=wordnet)
        assert meteor(prediction, reference) == pytest.approx(expected)
    assert meteor("", "a reply") == 0.0
    assert meteor("Honey. Bees.", "bees and honey") > 0, "a full stop within a text is no part of a word"
    synonym = meteor("a sick child", "an ill child")  # words that are their own stems: nltk looks up stems
    assert synonym > (0.6 if installed else 0) and (synonym < 0.4) == (not installed)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nltk.translate.meteor_score", None)
    with pytest.raises(ValueError, match=r"needs nltk: pip install 'perce\[metrics\]'"):
        metrics.meteor(True)


def test_clustered_mean_and_its_interval():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 20, 300)
    users = np.repeat(np.arange(60), 5)
    level = rng.normal(2.0, 0.5, 60)[users]  # examples of one user are similar
    sums = counts * (level + rng.normal(0, 0.1, 300))
    interval = clustered_mean(sums, counts, users)
    assert interval.value == pytest.approx(sums.sum() / counts.sum()) and interval.n == 300
    assert interval.low < interval.value < interval.high
    alone = clustered_mean(sums, counts, range(300))
    assert interval.high - interval.low > 1.5 * (alone.high - alone.low), "clusters widen the interval"
    assert clustered_mean(sums, counts, users) == interval, "the same data give the same interval"
    assert clustered_mean([0.0, 0.0], [0, 0], [1, 2]) is None


@pytest.mark.parametrize("clusters", [2, 3, 5, 10])
def test_intervals_over_few_users_cover_as_often_as_they_say(monkeypatch, clusters):
    monkeypatch.setattr(metrics, "RESAMPLES", 300)
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        weights = rng.integers(1, 20, clusters)
        interval = clustered_mean(rng.normal(2.0, 0.5, clusters) * weights, weights, range(clusters), seed)
        covered += interval.low <= 2.0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.98
    assert metrics._student(11) == pytest.approx(2.2010, abs=3e-3) and metrics._student(400) < 1.9665


@pytest.mark.parametrize("alike", [False, True], ids=["replies", "users"])
@pytest.mark.parametrize(("share", "users"), [(0.02, 20), (0.1, 5), (0.5, 20)])
def test_intervals_of_shares_cover_as_often_as_they_say(alike, share, users):
    """Resampling 20 users covered a share of 0.02 in 38 to 71 % of trials, because often no reply counts."""
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        of = np.repeat(np.arange(users), rng.integers(1, 6, users))
        replies = (rng.random(users)[of] if alike else rng.random(len(of))) < share
        interval = clustered_mean(replies, np.ones(len(of)), of, share=True)
        covered += interval.low <= share <= interval.high
    assert covered / 200 >= 0.9


def test_a_share_of_nothing_or_all_has_an_interval():
    of = np.repeat(np.arange(24), 2)
    none, every = (clustered_mean([value] * 48, np.ones(48), of, share=True) for value in (0.0, 1.0))
    t = metrics._student(23)
    assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(t**2 / (24 + t**2)), "of 24 users"
    assert (every.value, every.low, every.high) == pytest.approx((1, 1 - none.high, 1))
    independent = clustered_mean([1, 0] * 50, np.ones(100), range(100), share=True)
    doubled = clustered_mean([1, 1, 0, 0] * 50, np.ones(200), np.repeat(range(100), 2), share=True)
    assert doubled == independent._replace(n=200), "what a user repeats is no evidence"
    of, replies = np.array([0] * 99 + [*range(1, 100)]), [1, 0] * 99  # half of all replies are of one user
    wide, plain = clustered_mean(replies, np.ones(198), of, share=True), clustered_mean(replies, np.ones(198), of)
    assert wide.low <= plain.low and plain.high <= wide.high, "Wilson's covers too little there"
    assert clustered_mean([0.0, 0.0], [1, 1], ["ana", "ana"], share=True).low is None


def test_intervals_of_many_users_take_little_memory():
    """All resamples at once took 50 KB per user."""
    values = np.random.default_rng(0).normal(2.0, 0.5, 4000)
    tracemalloc.start()
    clustered_mean(values, np.ones(4000), range(4000))
    paired_difference(values, values + 0.1, np.ones(4000), range(4000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_one_user_has_no_interval():
    interval = clustered_mean([1.0, 2.0], [1, 1], ["ana", "ana"])
    assert (interval.value, interval.low, interval.high, interval.clusters) == (1.5, None, None, 1)
    assert interval.span() == "one user"
    alone = clustered_mean([8.0, *[0.0] * 9], [4, *[0] * 9], range(10))
    assert (alone.value, alone.low, alone.clusters, alone.n) == (2.0, None, 1, 1), "the other users have no such tokens"


def test_paired_difference_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(1)
    base = rng.normal(3.0, 1.0, 200)
    noise = rng.normal(0.0, 0.1, 200)
    difference, p = paired_difference(base + 0.05 + noise, base, np.ones(200), range(200))
    assert difference.value == pytest.approx(0.05 + noise.mean()) and p < 0.01 and difference.low > 0
    ps = [
        paired_difference(base + rng.normal(0, 0.1, 200), base, np.ones(200), range(200), seed)[1] for seed in range(20)
    ]
    assert sum(p < 0.05 for p in ps) <= 4
    assert paired_difference(base, base, np.ones(200), range(200))[1] == 1.0


def test_identification_against_brute_force():
    rng = np.random.default_rng(2)
    labels = rng.random(120) < 0.3
    scores = np.round(labels + rng.normal(0, 1, 120), 1)  # rounded: ties
    result = identification(scores, labels)
    above = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert result.auc == pytest.approx(np.mean(above))
    best = max(2 * (labels & (scores >= t)).sum() / ((scores >= t).sum() + labels.sum()) for t in np.unique(scores))
    assert result.f1 == pytest.approx(best)
    found = scores >= result.threshold
    assert result.precision == pytest.approx((labels & found).sum() / found.sum())
    assert result.recall == pytest.approx((labels & found).sum() / labels.sum())
    assert identification([1.0, 2.0, 3.0, 4.0], [False, False, True, True]).auc == 1.0
    with pytest.raises(ValueError, match="expected tokens of both kinds, got 2 labelled and 0 others"):
        identification([1.0, 2.0], [True, True])


def test_of_few_clusters_all_signs_are_tried():
    """Four of one sign: 2 of 16. Draws would give a number about it, which depends on the seed and may lie below."""
    differences = [1.0, 2.0, 3.0, 4.0]
    for seed in range(3):
        found = metrics.paired_difference(differences, [0.0] * 4, [1.0] * 4, range(4), seed=seed)
        assert found[1] == 2 / 16
    mixed = metrics.paired_difference([3.0, -1.0, 1.0], [0.0] * 3, [1.0] * 3, range(3))
    assert mixed[1] == 6 / 8, "5, 3, 3 and 1 in absolute value, twice each: six are at least 3"
