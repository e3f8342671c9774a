"""What answers are worth beside the reference ones: a score for each question, then means with their intervals.

A prediction is a dict with `prediction`, `reference`, the `language` of the question or None, and `answers`: what
several people said, for visual question answering, or nothing. Where several references are right, as the captions of
a COCO picture are, `references` holds all of them.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import zip_longest
from math import log, sqrt
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any
from unicodedata import normalize

import numpy as np
import regex

# A word is a run of letters and digits with their combining marks, by which Hindi and Arabic write vowels. Characters
# of texts without spaces are words: Chinese, Japanese, and Unicode's line breaks SA (Thai, Lao, Khmer, Burmese)
IDEOGRAPH = r"\u3040-\u3098\u309b-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
LETTERS = rf"(?![{IDEOGRAPH}\p{{LB=SA}}])[\p{{L}}\p{{N}}](?:(?![{IDEOGRAPH}\p{{LB=SA}}])[\p{{L}}\p{{N}}\p{{M}}])*"
WORD = regex.compile(rf"[{IDEOGRAPH}]\p{{M}}*|(?=\p{{LB=SA}})\X|{LETTERS}(?:'{LETTERS})*")
APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ‛＇′`´", "'"))
# NFKC and lower case write these otherwise than people do
RECOMPOSED = {"\u0e4d\u0e32": "\u0e33", "\u0ecd\u0eb2": "\u0eb3", "i\u0307": "i"}
# What the program of the VQA challenge (GT-Vision-Lab/VQA, vqaEval.py) takes for the same
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(COUNTED)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ENDINGS = {
    "n't": "ai are ca could did do does had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "": "ma'am o'clock 'ow's'at 'twas y'all y'all'll y'all'd've",
}
CONTRACTIONS = {
    whole[:i] + whole[i + 1 :]: whole  # written with one apostrophe too few
    for ending, stems in ENDINGS.items()
    for whole in (stem + ending for stem in stems.split())
    for i, character in enumerate(whole)
    if character == "'"
} | {"somebody'd": "somebodyd"}
RESAMPLES = 1000

Prediction = dict[str, Any]


def words(text: str) -> list[str]:
    """The words of a text without punctuation; case, width and the kind of apostrophe do not count."""
    text = normalize("NFKC", text.translate(APOSTROPHES)).casefold()
    for pair, character in RECOMPOSED.items():
        text = text.replace(pair, character)
    return WORD.findall(text)


def references(prediction: Prediction) -> list[str]:
    """All answers that are right."""
    return prediction.get("references") or [prediction["reference"]]


def is_exact(prediction: Prediction) -> bool:
    """Whether an answer equals one of its references letter by letter."""
    answer, *right = (normalize("NFC", text).strip() for text in (prediction["prediction"], *references(prediction)))
    return answer in right


def token_f1(prediction: Prediction) -> float:
    """The harmonic mean of the shares of the answer's and of the reference's words that are in the other, as SQuAD's
    (Rajpurkar et al., 2016), but that articles count; the best over the references."""
    answer = Counter(words(prediction["prediction"]))
    right = [Counter(words(reference)) for reference in references(prediction)]
    return max(2 * (answer & reference).total() / max(1, answer.total() + reference.total()) for reference in right)


class Words:
    """`words` as the tokenizer of rouge_score."""

    tokenize = staticmethod(words)


@lru_cache
def rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes a second, and the model card needs none

    return RougeScorer(["rougeL"], tokenizer=Words())


def rouge_l(prediction: Prediction) -> float:
    """ROUGE-L (Lin, 2004): the F score of the longest common subsequence of words; the best over the references."""
    return rouge_scorer().score_multi(references(prediction), prediction["prediction"])["rougeL"].fmeasure


def vqa_accuracy(prediction: Prediction) -> float:
    """The accuracy of VQA (Antol et al., 2015): right as far as three people said the same, on average over the groups
    that leave one of them out. Where they were less than four, all that are left must have said it.

    As in the challenge's program, texts are made alike (see `_vqa_text`) unless all people wrote the very same.
    """
    answer, *given = (
        re.sub(r"[\n\t]", " ", normalize("NFC", text)).strip()
        for text in (prediction["prediction"], *prediction["answers"])
    )
    if len(set(given)) > 1:
        answer, *given = map(_vqa_text, (answer, *given))
    same = [answer == text for text in given]
    if len(same) == 1:
        return float(same[0])
    return mean(min(1, (sum(same) - left_out) / min(3, len(same) - 1)) for left_out in same)


def _vqa_text(text: str) -> str:
    """A text without what does not count: case, articles, punctuation, and how numbers and contractions are written.

    A mark is taken out where it stands beside a space somewhere, all marks where a comma stands between digits, and is
    a space otherwise; a point stays in front of a digit.
    """
    thousands, plain = re.search(r"\d,\d", text), text
    for mark in PUNCTUATION:
        plain = plain.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    plain_words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", plain).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in plain_words if word not in ARTICLES)


def anls(prediction: Prediction) -> float:
    """ANLS (Biten et al., 2019): how like the answer is to the likest of the `answers`, by the letters to be changed;
    0 where these are half of the longer text or more. Case and white space do not count."""
    from nltk.metrics.distance import edit_distance  # here, as above

    answer, *right = (
        " ".join(normalize("NFC", text).lower().split()) for text in (prediction["prediction"], *prediction["answers"])
    )
    changed = min(edit_distance(answer, text) / max(len(answer), len(text), 1) for text in set(right))
    return 1 - changed if changed < 0.5 else 0.0


def cider(predictions: list[Prediction]) -> list[float]:
    """CIDEr-D of each answer (Vedantam et al., 2015), from 0 to 10, words rare in these references weighing more; the
    mean over the references."""
    answers = [_ngrams(words(p["prediction"])) for p in predictions]
    right = [[_ngrams(words(reference)) for reference in references(p)] for p in predictions]
    seen_in = Counter(ngram for counts in right for ngram in set().union(*counts))
    weights = {ngram: log(len(predictions) / times) for ngram, times in seen_in.items()}
    unseen = log(len(predictions))

    def similarity(answer: Counter, reference: Counter) -> float:
        vectors = [
            {ngram: n * weights.get(ngram, unseen) for ngram, n in side.items()} for side in (answer, reference)
        ]
        similarities = []
        for size in range(1, 5):
            ours, theirs = ({g: v for g, v in vector.items() if len(g) == size} for vector in vectors)
            dot = sum(min(v, theirs.get(g, 0)) * theirs.get(g, 0) for g, v in ours.items())
            norms = sqrt(sum(v * v for v in ours.values())) * sqrt(sum(v * v for v in theirs.values()))
            similarities.append(dot / norms if norms else 0.0)
        # lengths in pairs of words, as the authors' program counts them
        longer = sum(n for g, n in answer.items() if len(g) == 2) - sum(n for g, n in reference.items() if len(g) == 2)
        return 10 * mean(similarities) * float(np.exp(-(longer**2) / 72))

    return [
        mean(similarity(answer, reference) for reference in counts)
        for answer, counts in zip(answers, right, strict=True)
    ]


def _ngrams(tokens: list[str]) -> Counter:
    return Counter(tuple(tokens[i : i + size]) for size in range(1, 5) for i in range(len(tokens) - size + 1))


def bleu(predictions: list[Prediction]) -> float:
    """BLEU-4 over all answers (Papineni et al., 2002), from 0 to 1, counts of zero smoothed as sacrebleu does."""
    from sacrebleu.metrics import BLEU  # here, as above

    answers = [" ".join(words(p["prediction"])) for p in predictions]
    right = ([" ".join(words(reference)) for reference in references(p)] for p in predictions)
    # the first references of all, the second ones, …
    return BLEU(tokenize="none", force=True).corpus_score(answers, list(zip_longest(*right))).score / 100


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


# Each metric's name in tables, and what scores each question; None where it is of all together, or in `score_exact`
SCORES: dict[str, tuple[str, Callable[[list[Prediction]], list[float]] | None]] = {
    "exact_match": ("exact match", None),
    "token_f1": ("token F1", lambda predictions: list(map(token_f1, predictions))),
    "rouge_l": ("ROUGE-L", lambda predictions: list(map(rouge_l, predictions))),
    "bleu": ("BLEU-4", None),
    "cider": ("CIDEr-D", cider),
    "vqa_accuracy": ("VQA accuracy", lambda predictions: [vqa_accuracy(p) for p in predictions if p["answers"]]),
    "anls": ("ANLS", lambda predictions: [anls(p) for p in predictions if p["answers"]]),
}
METRICS = {metric: name for metric, (name, _) in SCORES.items()}


def undefined(predictions: list[Prediction]) -> dict[str, str]:
    """The metrics that even the references would score 0 in, each with the reason."""
    right = [set().union(*(_ngrams(words(reference)) for reference in references(p))) for p in predictions]
    reasons = {}
    if max((len(ngram) for ngrams in right for ngram in ngrams), default=0) < 4:
        reasons["bleu"] = "no reference has four words"
    if all(ngrams == right[0] for ngrams in right):
        reasons["cider"] = "no question has words in its references that another has not"
    return reasons


def score_group(predictions: list[Prediction]) -> dict[str, Any]:
    """Every metric over some predictions, and the 95 % interval of each that is a mean over questions.

    Those that are not defined for these references are left out, and `undefined` has the reasons.
    """
    exact, left_out = score_exact(predictions), undefined(predictions)
    for metric, (_, score) in SCORES.items():
        values = [] if score is None or metric in left_out else score(predictions)
        if values:
            exact[metric], exact["intervals"][metric] = mean(values), bootstrap(values)
    if "bleu" not in left_out:
        exact["bleu"] = bleu(predictions)
    return exact | ({"undefined": left_out} if left_out else {})


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
    """What one constant answer per language could score at most: the one that is right most often."""
    counts: dict[str, Counter] = {}
    for p in predictions:
        counts.setdefault(p["language"], Counter()).update(list(dict.fromkeys(references(p))))
    return [p | {"prediction": counts[p["language"]].most_common(1)[0][0]} for p in predictions]


def difference(predictions: list[Prediction], others: list[Prediction]) -> tuple[float, list[float]]:
    """How much more often one run is exact than another on the same questions, and the 95 % interval of that."""
    steps = [float(is_exact(a)) - float(is_exact(b)) for a, b in zip(predictions, others, strict=True)]
    return mean(steps), bootstrap(steps)


def read_metrics(folder: Path) -> dict[str, Any]:
    """What an evaluation wrote into `metrics.json`.

    Raises:
        ValueError: the folder has none, or one that is something else.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        for scores in (metrics, *metrics.get("by_language", {}).values()):
            low, high = scores["intervals"]["exact_match"]
            numbers = (scores["n"], scores["exact_match"], low, high, *(scores[m] for m in METRICS if m in scores))
            sum(numbers)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} holds no metrics.json that evaluate wrote: {error!r}") from error
    return metrics
