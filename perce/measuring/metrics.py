"""Scores of generated replies, and statistics over examples. This module does not depend on models.

REPLY_METRICS        scores of a reply, by name: rouge and meteor, by the rouge-score and nltk packages, offline
clustered_mean       token-weighted mean with a bootstrap interval over clusters (users), or Wilson's for a share
paired_difference    the same for the difference of two models on the same examples, with a p-value
identification       how well a per-token score finds labelled tokens: AUC, best F1
"""

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from perce.data.words import IDEOGRAPHS, LETTERS
from perce.errors import UserError

RESAMPLES = 2000
CONFIDENCE = 0.95
FEW = 10  # with fewer clusters (users), one more or less changes the result
NORMAL_QUANTILE = 1.959964  # at (1 + CONFIDENCE) / 2, as are those of Student's t for 1, 2, … degrees of freedom
STUDENT_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
WORDNET_DIRECTORIES = ("/usr/share/wordnet",)  # Debian's wordnet-base
ROUGE_NOTE = "ROUGE: rouge-score, F1, no stemmer"
UNBOUNDED, SHARE = (-math.inf, math.inf), (0.0, 1.0)  # bounds of a metric
# Scripts without spaces between words: each of their characters counts as a word. Rare ideographs too.
_UNSPACED = re.compile(rf"([{IDEOGRAPHS}{LETTERS}\U00020000-\U0003ffff])")


def _needs(package: str) -> UserError:
    return UserError(f"Scoring replies needs {package}: pip install 'perce[metrics]', or pass --generate false.")


def _apart(text: str) -> str:
    """The text with spaces around the characters of scripts that have none."""
    return _UNSPACED.sub(r" \1 ", unicodedata.normalize("NFC", text))


class _Words:
    """A tokenizer for rouge-score: words of letters, digits and the marks on them. Its own reads only a-z and 0-9, of
    which these are the same words."""

    def tokenize(self, text: str) -> list[str]:
        kept = (x if x.isalnum() or unicodedata.category(x)[0] == "M" else " " for x in _apart(text.lower()))
        return "".join(kept).split()


def rouge(kind: str) -> "Scorer":
    """ROUGE F1 ("rouge1", "rougeL") in [0, 1] (Lin 2004), without stemming, as `evaluate` and LongLaMP compute it."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _needs("rouge-score") from error
    scorer = RougeScorer([kind], tokenizer=_Words())
    return lambda reply, reference: scorer.score(reference, reply)[kind].fmeasure


def meteor(synonyms: bool) -> "Scorer | None":
    """METEOR (Banerjee and Lavie 2005) as nltk computes it, in [0, 1], tokenised sentence by sentence as nltk's
    word_tokenize does, without its downloaded list of abbreviations; None if its other form is computed here: that with
    synonyms if WordNet is installed (nltk's corpus, or Debian's wordnet-base). Without synonyms the score is lower, and
    must not be confused with METEOR."""
    try:
        from nltk.tokenize import NLTKWordTokenizer, PunktSentenceTokenizer
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError as error:
        raise _needs("nltk") from error
    wordnet, sentences, tokenizer = _find_wordnet(), PunktSentenceTokenizer(), NLTKWordTokenizer()
    if (wordnet is not None) != synonyms:
        return None
    known = wordnet if synonyms else SimpleNamespace(synsets=lambda word: [])

    def words(text: str) -> list[str]:
        return [word for sentence in sentences.tokenize(_apart(text)) for word in tokenizer.tokenize(sentence)]

    def score(reply: str, reference: str) -> float:
        both = words(reference), words(reply)
        return float(single_meteor_score(*both, wordnet=known)) if all(both) else 0.0

    return score


@cache
def _find_wordnet() -> Any:
    import nltk
    from nltk.corpus import wordnet
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class DebianWordNet(WordNetCorpusReader):
        """Debian leaves out the list of lexicographer files; METEOR needs neither it nor the synset numbers of other
        releases, which nltk also reads."""

        def open(self, file: str) -> Any:
            names = "".join(f"{number} file{number} 0\n" for number in range(45))
            return io.StringIO(names) if file == "lexnames" else super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            return None

    try:
        wordnet.ensure_loaded()
        return wordnet
    except LookupError:
        pass
    for directory in WORDNET_DIRECTORIES:
        if (Path(directory) / "index.noun").is_file():
            nltk.data.path.append(directory)  # nltk opens only files in its own paths
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns that other languages are missing
                return DebianWordNet(directory, None)
    return None


Scorer = Callable[[str, str], float | None]
"""(generated reply, what the user wrote) → a number; None or NaN if this reply has none."""


class ReplyMetric(NamedTuple):
    label: str
    scorer: Callable[[], Scorer | None]
    """Called once per evaluation; None if another metric replaces this one."""
    bounds: tuple[float, float] = UNBOUNDED
    better: str = "↑"
    """Whether more (↑), less (↓) or neither (–) is better."""


REPLY_METRICS = {
    "rouge1": ReplyMetric("ROUGE-1", lambda: rouge("rouge1"), SHARE),
    "rougeL": ReplyMetric("ROUGE-L", lambda: rouge("rougeL"), SHARE),
    "meteor": ReplyMetric("METEOR", lambda: meteor(True), SHARE),
    "meteor_exact_stem": ReplyMetric("METEOR, exact and stem only", lambda: meteor(False), SHARE),
}


def reply_scorers() -> dict[str, Scorer]:
    """The metrics that can be computed here, by name. UserError for a package that is missing."""
    return {name: scorer for name, metric in REPLY_METRICS.items() if (scorer := metric.scorer())}


class Interval(NamedTuple):
    """An estimate with its confidence interval over n observations (examples) in so many clusters (users).

    With only one cluster there is no interval (None), because it says nothing about how clusters differ.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int

    def span(self, digits: str = ".4f", alone: str = "one user") -> str:
        """The interval in words; `digits` as in an f-string, `alone` is the text if there is no interval."""
        if self.low is None or self.high is None:
            return alone
        return f"{self.low:{digits}} to {self.high:{digits}}"


def _cluster_sums(values: Sequence[float], weights: Sequence[float], clusters: Sequence[Any]) -> np.ndarray:
    """(2, C): Σ value and Σ weight of each cluster."""
    _, of = np.unique(np.asarray([str(cluster) for cluster in clusters]), return_inverse=True)
    return np.stack([np.bincount(of, np.asarray(x, dtype=float)) for x in (values, weights)])


def _resamples(clusters: int) -> list[int]:
    """RESAMPLES, divided such that about 100,000 numbers are drawn at a time."""
    most = max(1, 2**17 // clusters)
    return [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]


def _interval(
    sums: np.ndarray, n: int, seed: int, bounds: tuple[float, float], *, share: bool = False
) -> Interval:  # fmt: skip
    """Σ values / Σ weights with its percentile interval over resampled clusters, widened if they are few.

    Resampling C clusters underestimates the variance by a factor of (C − 1) / C and ignores its own uncertainty: with
    five Gaussian clusters, intervals covered the truth in 80 % of trials. Widening by the ratio of Student's t to the
    normal quantile makes it 95 %. It ends at the bounds of what the value can be, and that of a
    share not before Wilson's.
    """
    sums = sums[:, sums[1] > 0]  # a user without such tokens says nothing about how users differ
    total, weight = sums.sum(1)
    value, clusters = float(total / weight), sums.shape[1]
    if clusters < 2:
        return Interval(value, None, None, n, clusters)
    rng = np.random.default_rng(seed)
    drawn = [sums[:, rng.integers(0, clusters, (rows, clusters))].sum(-1) for rows in _resamples(clusters)]
    values, weights = np.concatenate(drawn, axis=1)
    low, high = np.quantile(values / weights, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    wider = np.sqrt(clusters / (clusters - 1)) * _student(clusters - 1) / NORMAL_QUANTILE
    low, high = max(value - wider * (value - low), bounds[0]), min(value + wider * (high - value), bounds[1])
    if share:
        lowest, highest = _wilson(value, sums)
        low, high = min(low, lowest), max(high, highest)
    return Interval(value, float(low), float(high), n, clusters)


def _wilson(share: float, sums: np.ndarray) -> tuple[float, float]:
    """Wilson's interval of a share with Student's t. The bootstrap's has no width if no reply counts, and covered a
    share of 0.02 of 20 users in 38 to 71 % of trials; this one in 94 to 96 %.

    It is that of as many independent replies as would have the variance between clusters, at most of those that there
    are (Korn and Graubard 1998); of one reply a cluster if the share is 0 or 1, which says nothing of that variance.
    """
    count, clusters, spread = sums[1].sum(), sums.shape[1], share * (1 - share)
    if spread:
        between = ((sums[0] - share * sums[1]) ** 2).sum() * clusters / (clusters - 1)
        independent = count / max(1.0, between / (count * spread))
    else:
        independent = clusters
    rest = _student(clusters - 1) ** 2 / independent
    middle, half = share + rest / 2, math.sqrt(rest * (spread + rest / 4))
    return max(0.0, float((middle - half) / (1 + rest))), min(1.0, float((middle + half) / (1 + rest)))


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5; from a table where that is inaccurate)."""
    if freedom <= len(STUDENT_QUANTILES):
        return STUDENT_QUANTILES[freedom - 1]
    z = NORMAL_QUANTILE
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def clustered_mean(
    values: Sequence[float], weights: Sequence[float], clusters: Sequence[Any], seed: int = 0,
    bounds: tuple[float, float] = UNBOUNDED, share: bool = False,
) -> Interval | None:  # fmt: skip
    """Σ values / Σ weights (for example a sum of losses over a count of tokens) with a 95 % bootstrap interval within
    the bounds. share: whether every value is 0 or 1; then the interval is at least as wide as Wilson's.

    Whole clusters are resampled, because examples of one user are not independent. None if the weights are all 0.
    """
    sums = _cluster_sums(values, weights, clusters)
    if not sums[1].any():
        return None
    return _interval(sums, int(np.count_nonzero(weights)), seed, SHARE if share else bounds, share=share)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], weights: Sequence[float], clusters: Sequence[Any], seed: int = 0,
    bounds: tuple[float, float] = UNBOUNDED,
) -> tuple[Interval, float] | None:  # fmt: skip
    """(mean of ours − theirs with its interval, two-sided p-value) on the same examples; None if the weights are all 0.

    bounds: of what is compared. The p-value is that of a permutation test: under the null hypothesis the two models are
    exchangeable within each cluster, so the sign of each cluster's difference is random. Of few clusters all signs are
    tried, of more RESAMPLES draws.
    """
    mine, its = (np.asarray(side, dtype=float) for side in (ours, theirs))
    difference = np.where(np.isclose(mine, its, 1e-12, 0), 0, mine - its)  # means over several results are rounded
    sums = _cluster_sums(difference.tolist(), weights, clusters)
    total, weight = sums.sum(1)
    if not weight:
        return None
    count = sums.shape[1]
    if exact := 2**count <= RESAMPLES:
        flipped = abs(np.array([*product([-1.0, 1.0], repeat=count)]) @ sums[0])
    else:
        rng = np.random.default_rng(seed)
        drawn = [abs((rng.choice([-1.0, 1.0], (rows, count)) * sums[0]).sum(1)) for rows in _resamples(count)]
        flipped = np.concatenate(drawn)
    as_far = np.count_nonzero(flipped >= abs(total) * (1 - 1e-12))  # a draw does not contain the signs that were found
    p = as_far / 2**count if exact else (1 + as_far) / (1 + RESAMPLES)
    least, most = bounds
    return _interval(sums, int(np.count_nonzero(weights)), seed, (least - most, most - least)), float(p)


@dataclass(frozen=True)
class Identification:
    """How well a score tells labelled tokens from the others."""

    auc: float
    """Probability that a labelled token scores above one that is not; ties count half."""
    f1: float
    """Largest over all thresholds; precision and recall are at that threshold. Predicted if score ≥ threshold."""
    precision: float
    recall: float
    threshold: float


def identification(scores: Sequence[float], labels: Sequence[bool]) -> Identification:
    """AUC and best-threshold F1 of `scores` against `labels`. ValueError unless there are tokens of both kinds."""
    score, label = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    positives, negatives = int(label.sum()), int((~label).sum())
    if not positives or not negatives:
        raise ValueError(f"labels: expected tokens of both kinds, got {positives} labelled and {negatives} others")
    order = np.argsort(-score, kind="stable")
    score, label = score[order], label[order]
    ends = np.flatnonzero(np.append(score[1:] != score[:-1], True))  # the last of each run of equal scores
    true = np.cumsum(label)[ends]
    found = ends + 1
    false = found - true
    area = np.diff(false, prepend=0) * (true + np.concatenate([[0], true[:-1]])) / 2
    precision, recall = true / found, true / positives
    f1 = 2 * true / (found + positives)
    best = int(f1.argmax())
    return Identification(
        auc=float(area.sum() / (positives * negatives)),
        f1=float(f1[best]), precision=float(precision[best]), recall=float(recall[best]),
        threshold=float(score[ends[best]]),
    )  # fmt: skip
