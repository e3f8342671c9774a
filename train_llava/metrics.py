"""What answers are worth beside the reference ones: a score for each question, then means with their intervals.

A prediction is a dict with `prediction`, `reference`, the `language` of the question or None, and `answers`: what
several people said, for visual question answering, or nothing.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from math import log, sqrt
from statistics import NormalDist, mean
from typing import Any

import numpy as np

METRICS = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU-4",
    "cider": "CIDEr-D",
    "vqa_accuracy": "VQA accuracy",
}
# A word is a run of letters and digits; Chinese and Japanese characters, which nothing separates, are words each
IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{IDEOGRAPH}]|[^\W_{IDEOGRAPH}]+(?:['’][^\W_{IDEOGRAPH}]+)*")
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(i) for i, word in enumerate(COUNTED)}
ARTICLES = ("a", "an", "the")
RESAMPLES = 1000

Prediction = dict[str, Any]


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def is_exact(prediction: Prediction) -> bool:
    """Whether an answer equals its reference letter by letter."""
    return prediction["prediction"].strip() == prediction["reference"].strip()


def token_f1(prediction: Prediction) -> float:
    """The harmonic mean of the shares of the answer's and of the reference's words that are in the other, as SQuAD's
    (Rajpurkar et al., 2016), but that articles count."""
    answer, reference = Counter(words(prediction["prediction"])), Counter(words(prediction["reference"]))
    return 2 * (answer & reference).total() / max(1, answer.total() + reference.total())


class Words:
    """`words` as the tokenizer of rouge_score."""

    tokenize = staticmethod(words)


@lru_cache
def rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes a second, and the model card needs none

    return RougeScorer(["rougeL"], tokenizer=Words())


def rouge_l(prediction: Prediction) -> float:
    """ROUGE-L (Lin, 2004): the F score of the longest common subsequence of words."""
    return rouge_scorer().score(prediction["reference"], prediction["prediction"])["rougeL"].fmeasure


def vqa_accuracy(prediction: Prediction) -> float:
    """The accuracy of VQA (Antol et al., 2015): right as far as three people said the same, on average over the groups
    that leave one of them out. Case, punctuation and articles do not count, and small numbers may be words."""
    answer = _vqa_words(prediction["prediction"])
    same = [answer == _vqa_words(given) for given in prediction["answers"]]
    if len(same) == 1:
        return float(same[0])
    return mean(min(1, (sum(same) - left_out) / min(3, len(same) - 1)) for left_out in same)


def _vqa_words(text: str) -> list[str]:
    return [NUMBERS.get(word, word) for word in words(text) if word not in ARTICLES]


def cider(predictions: list[Prediction]) -> list[float]:
    """CIDEr-D of each answer (Vedantam et al., 2015), from 0 to 10, words rare in these references weighing more."""
    counts = [[_ngrams(words(p[side])) for p in predictions] for side in ("prediction", "reference")]
    seen_in = Counter(ngram for reference in counts[1] for ngram in reference)
    scores = []
    for answer, reference in zip(*counts, strict=True):
        vectors = [
            {ngram: n * (log(len(predictions)) - log(max(1, seen_in[ngram]))) for ngram, n in side.items()}
            for side in (answer, reference)
        ]
        similarities = []
        for size in range(1, 5):
            ours, theirs = ({g: v for g, v in vector.items() if len(g) == size} for vector in vectors)
            dot = sum(min(v, theirs.get(g, 0)) * theirs.get(g, 0) for g, v in ours.items())
            norms = sqrt(sum(v * v for v in ours.values())) * sqrt(sum(v * v for v in theirs.values()))
            similarities.append(dot / norms if norms else 0.0)
        # lengths in pairs of words, as the authors' program counts them
        longer = sum(n for g, n in answer.items() if len(g) == 2) - sum(n for g, n in reference.items() if len(g) == 2)
        scores.append(10 * mean(similarities) * float(np.exp(-(longer**2) / 72)))
    return scores


def _ngrams(tokens: list[str]) -> Counter:
    return Counter(tuple(tokens[i : i + size]) for size in range(1, 5) for i in range(len(tokens) - size + 1))


def bleu(predictions: list[Prediction]) -> float:
    """BLEU-4 over all answers (Papineni et al., 2002), from 0 to 1, counts of zero smoothed as sacrebleu does."""
    from sacrebleu.metrics import BLEU  # here, as above

    answers, references = ([" ".join(words(p[side])) for p in predictions] for side in ("prediction", "reference"))
    return BLEU(tokenize="none", force=True).corpus_score(answers, [references]).score / 100


def wilson(hits: list[bool]) -> list[float]:
    """The 95 % interval of a share by the number of questions (Wilson, 1927)."""
    n, z = len(hits), NormalDist().inv_cdf(0.975)
    p = sum(hits) / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [max(0.0, centre - reach), min(1.0, centre + reach)]


def bootstrap(scores: list[float]) -> list[float]:
    """The 95 % interval of a mean, from means of scores drawn again with replacement (Efron, 1979)."""
    rng, given = np.random.default_rng(0), np.asarray(scores)
    means = [given[rng.integers(0, len(given), len(given))].mean() for _ in range(RESAMPLES)]
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def score_exact(predictions: list[Prediction]) -> dict[str, Any]:
    """The exact match of some predictions, its 95 % interval, and how many they are."""
    hits = [is_exact(p) for p in predictions]
    return {"n": len(hits), "exact_match": mean(hits), "intervals": {"exact_match": wilson(hits)}}


def score_group(predictions: list[Prediction]) -> dict[str, Any]:
    """Every metric over some predictions, and the 95 % interval of each that is a mean over questions."""
    scores = {"token_f1": list(map(token_f1, predictions)), "rouge_l": list(map(rouge_l, predictions))}
    scores["cider"] = cider(predictions)
    if answered := [p for p in predictions if p["answers"]]:
        scores["vqa_accuracy"] = list(map(vqa_accuracy, answered))
    exact = score_exact(predictions)
    exact["intervals"] |= {name: bootstrap(values) for name, values in scores.items()}
    return exact | {"bleu": bleu(predictions)} | {name: mean(values) for name, values in scores.items()}


def by_language(
    predictions: Iterable[Prediction], score: Callable[[list[Prediction]], dict[str, Any]]
) -> dict[str, Any]:
    """What `score` gives for all predictions and, under `by_language`, for each language where all say theirs."""
    predictions = list(predictions)
    groups: dict[str, list[Prediction]] = {}
    for p in predictions:
        groups.setdefault(p["language"], []).append(p)
    scores = score(predictions)
    if None not in groups:
        scores["by_language"] = {language: score(groups[language]) for language in sorted(groups)}
    return scores


def most_frequent_answer(predictions: list[Prediction]) -> list[Prediction]:
    """What one constant answer per language could score at most: the references' own most frequent one."""
    counts: dict[str, Counter] = {}
    for p in predictions:
        counts.setdefault(p["language"], Counter())[p["reference"]] += 1
    return [p | {"prediction": counts[p["language"]].most_common(1)[0][0]} for p in predictions]


def difference(predictions: list[Prediction], others: list[Prediction]) -> tuple[float, list[float]]:
    """How much more often one run is exact than another on the same questions, and the 95 % interval of that."""
    steps = [float(is_exact(a)) - float(is_exact(b)) for a, b in zip(predictions, others, strict=True)]
    return mean(steps), bootstrap(steps)
