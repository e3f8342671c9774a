"""Scores answers against their references: a score for each question, then means with 95 % intervals.

A prediction is a dict with `prediction`, `reference` and the `language` of the question or None. `answers` are those
of several people to a visual question. `references` are all right answers if there are several, such as the captions
of a COCO picture.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import chain, product, zip_longest
from math import exp, hypot, log, prod, sqrt
from pathlib import Path
from statistics import NormalDist, mean
from types import SimpleNamespace
from typing import Any
from unicodedata import normalize

import numpy as np
import regex

# Each metric's name in tables
METRICS = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU-4",
    "cider": "CIDEr-D",
    "vqa_accuracy": "VQA accuracy",
    "anls": "ANLS",
    "iou_50": "IoU above 0.5",
    "pointing": "pointing",
}
# A word is a run of letters and digits with their combining marks, such as the vowels of Hindi and Arabic.
# In scripts without spaces each character is a word: Chinese, Japanese, and Unicode's line break class SA
# (Thai, Lao, Khmer, Burmese)
IDEOGRAPH = r"\u3040-\u3098\u309b-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
IN_SPACED_TEXT = rf"(?![{IDEOGRAPH}\p{{LB=SA}}])"
LETTERS = rf"{IN_SPACED_TEXT}[\p{{L}}\p{{N}}](?:{IN_SPACED_TEXT}[\p{{L}}\p{{N}}\p{{M}}])*"
WORD = regex.compile(rf"[{IDEOGRAPH}]\p{{M}}*|(?=\p{{LB=SA}})\X|{LETTERS}(?:'{LETTERS})*")
APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ‛＇′`´", "'"))
# Three characters that NFKC and lower case take apart, and people do not
RECOMPOSED = {"\u0e4d\u0e32": "\u0e33", "\u0ecd\u0eb2": "\u0eb3", "i\u0307": "i"}
# The tables of the VQA challenge's program (GT-Vision-Lab/VQA, vqaEval.py)
VQA = json.loads(Path(__file__).with_name("vqa_normalization.json").read_text(encoding="utf-8"))
RESAMPLES = 1000

Prediction = dict[str, Any]


def words(text: str) -> list[str]:
    """The words of a text without punctuation. Case, width and the kind of apostrophe do not count."""
    text = normalize("NFKC", text.translate(APOSTROPHES)).casefold()
    for pair, character in RECOMPOSED.items():
        text = text.replace(pair, character)
    return WORD.findall(text)


def references(prediction: Prediction) -> list[str]:
    """All right answers."""
    return prediction.get("references") or [prediction["reference"]]


def is_exact(prediction: Prediction) -> bool:
    """Whether an answer equals one of its references letter by letter."""
    texts = (prediction["prediction"], *references(prediction))
    answer, *right = (normalize("NFC", text).strip() for text in texts)
    return answer in right


def token_f1(prediction: Prediction) -> float:
    """The F1 of the words (SQuAD; Rajpurkar et al., 2016), with articles; the best over the references."""
    answer, scores = Counter(words(prediction["prediction"])), []
    for text in references(prediction):
        reference = Counter(words(text))
        scores.append(2 * (answer & reference).total() / max(1, answer.total() + reference.total()))
    return max(scores)


def rouge_l(prediction: Prediction) -> float:
    """ROUGE-L (Lin, 2004): the F1 of the longest common subsequence, the best over the references."""
    from rouge_score.rouge_scorer import RougeScorer  # here, since importing it takes a second

    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))
    return scorer.score_multi(references(prediction), prediction["prediction"])["rougeL"].fmeasure


def vqa_accuracy(prediction: Prediction) -> float:
    """VQA accuracy (Antol et al., 2015): an answer is right if three people gave it, each one left out in turn.

    Of fewer than three people, all have to agree. Texts are normalised unless all wrote the very same, as in the
    challenge's program.

    Example: two of ten people said "dog". Without one of these two, one agrees: 1/3. Without one of the other
    eight, two agree: 2/3. So "dog" scores (2 * 1/3 + 8 * 2/3) / 10 = 0.6.
    """
    texts = (prediction["prediction"], *prediction["answers"])
    answer, *people = (re.sub(r"[\n\t]", " ", normalize("NFC", text)).strip() for text in texts)
    if len(set(people)) > 1:
        answer, *people = map(_normalized_vqa_text, (answer, *people))
    agrees = [answer == text for text in people]
    if len(agrees) == 1:
        return float(agrees[0])
    return mean(min(1, (sum(agrees) - left_out) / min(3, len(agrees) - 1)) for left_out in agrees)


def _normalized_vqa_text(text: str) -> str:
    """A text without case, articles and punctuation, and with numbers and contractions written in one way.

    A mark is removed if it has a space next to it anywhere in the text. If a comma is between digits, all marks are
    removed. Other marks become spaces. A point in front of a digit stays.

    Example: "The U.S. has 1,000 t-shirts!" becomes "us has 1000 tshirts", and "a t-shirt" becomes "t shirt".
    """
    has_thousands, plain = re.search(r"\d,\d", text), text
    for mark in VQA["punctuation"]:
        removed = has_thousands or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if removed else " ")
    plain_words = [VQA["digits"].get(word, word) for word in re.sub(r"\.(?!\d)", "", plain).lower().split()]
    plain_words = [word for word in plain_words if word not in VQA["articles"]]
    return " ".join(VQA["contractions"].get(word, word) for word in plain_words)


def anls(prediction: Prediction) -> float:
    """ANLS (Biten et al., 2019): 1 less the share of letters to change for the nearest of the `answers`.

    It is 0 where half of the longer text or more has to change. Case and white space do not count.
    """
    from nltk.metrics.distance import edit_distance  # here, as above

    texts = (prediction["prediction"], *prediction["answers"])
    answer, *right = (" ".join(normalize("NFC", text).lower().split()) for text in texts)
    changed = min(edit_distance(answer, text) / max(len(answer), len(text), 1) for text in set(right))
    return 1 - changed if changed < 0.5 else 0.0


def _ngrams(text: list[str], size: int) -> Counter:
    """How often each run of `size` words occurs in a text."""
    return Counter(zip(*(text[start:] for start in range(size)), strict=False))


def _reference_ngrams(prediction: Prediction) -> frozenset[tuple[str, ...]]:
    """The runs of one to four words in a question's references."""
    texts = map(words, references(prediction))
    return frozenset().union(*(_ngrams(text, size) for text, size in product(texts, range(1, 5))))


def cider(predictions: list[Prediction]) -> list[float]:
    """CIDEr-D of each answer (Vedantam et al., 2015), 0 to 10, its mean over the references. Rare words weigh more."""
    # The number of questions whose references have each run of words
    frequency = Counter(chain.from_iterable(map(_reference_ngrams, predictions)))
    rarity = {ngram: log(len(predictions) / number) for ngram, number in frequency.items()}
    rarity = defaultdict(lambda: log(len(predictions)), rarity)  # of a run that is in no reference
    scores = []
    for p in predictions:
        answer = words(p["prediction"])
        scores.append(mean(_cider_d(answer, words(text), rarity) for text in references(p)))
    return scores


def _cider_d(answer: list[str], reference: list[str], rarity: dict[tuple[str, ...], float]) -> float:
    """CIDEr-D of one answer's words against one reference's."""
    cosines = []
    for size in range(1, 5):
        ours, theirs = _ngrams(answer, size), _ngrams(reference, size)
        # A run that the answer repeats counts as often as in the reference
        dot = sum(count * theirs[ngram] * rarity[ngram] ** 2 for ngram, count in (ours & theirs).items())
        norms = [hypot(*(count * rarity[ngram] for ngram, count in text.items())) for text in (ours, theirs)]
        cosines.append(dot / prod(norms) if all(norms) else 0.0)
    # An answer of another length scores less; as in the authors' program, a length counts pairs of words
    longer = max(0, len(answer) - 1) - max(0, len(reference) - 1)
    return 10 * mean(cosines) * exp(-(longer**2) / 72)


def bleu(predictions: list[Prediction]) -> float:
    """BLEU-4 over all answers (Papineni et al., 2002), from 0 to 1. sacrebleu smooths counts of zero."""
    from sacrebleu.metrics import BLEU  # here, as above

    answers, right = [], []
    for p in predictions:
        answers.append(" ".join(words(p["prediction"])))
        right.append([" ".join(words(text)) for text in references(p)])
    # sacrebleu wants the first references of all questions, then the second ones, …
    columns = list(zip_longest(*right))
    return BLEU(tokenize="none", force=True).corpus_score(answers, columns).score / 100


def places_in(text: str) -> list[list[float]]:
    """The boxes and points that a text names, such as `[10, 20, 500, 400]`."""
    found = re.findall(r"\[\s*(\d+(?:\.\d+)?(?:\s*,\s*\d+(?:\.\d+)?){1,3})\s*\]", text)
    places = [[float(number) for number in numbers.split(",")] for numbers in found]
    return [place for place in places if len(place) != 3]


def intersection_over_union(box: list[float], other: list[float]) -> float:
    """The area that two boxes share, over the area that they cover."""
    common = [*map(max, box[:2], other[:2]), *map(min, box[2:], other[2:])]
    ours, theirs, shared = (max(x2 - x1, 0) * max(y2 - y1, 0) for x1, y1, x2, y2 in (box, other, common))
    return shared / max(ours + theirs - shared, 1e-9)


def box_accuracy(prediction: Prediction) -> float | None:
    """The share of the reference's boxes that the answer's boxes, in this order, meet with an IoU above 0.5."""
    boxes = [place for place in places_in(prediction["reference"]) if len(place) == 4]
    answered = [place for place in places_in(prediction["prediction"]) if len(place) == 4]
    hits = [intersection_over_union(*pair) > 0.5 for pair in zip(boxes, answered, strict=False)]
    return sum(hits) / len(boxes) if prediction.get("places") and boxes else None


def pointing_accuracy(prediction: Prediction) -> float | None:
    """The share of an answer's objects inside which its points lie, in this order. A box points to its middle."""
    boxes, hits = [place for place in prediction.get("places", []) if len(place) == 4], 0
    for (x1, y1, x2, y2), place in zip(boxes, places_in(prediction["prediction"]), strict=False):
        x, y = (place[0] + place[-2]) / 2, (place[1] + place[-1]) / 2  # of a point, itself
        hits += x1 <= x <= x2 and y1 <= y <= y2
    return hits / len(boxes) if boxes else None


def wilson(hits: list[bool]) -> list[float]:
    """The 95 % interval of a share by the number of questions (Wilson, 1927)."""
    n, z = len(hits), NormalDist().inv_cdf(0.975)
    p = sum(hits) / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [max(0.0, centre - reach), min(1.0, centre + reach)]


def bootstrap(scores: list[float]) -> list[float]:
    """The 95 % interval of a mean, from the means of scores drawn again with replacement (Efron, 1979)."""
    rng, scores = np.random.default_rng(0), np.asarray(scores)
    means = [scores[rng.integers(0, len(scores), len(scores))].mean() for _ in range(RESAMPLES)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def score_exact(predictions: list[Prediction]) -> dict[str, Any]:
    """The number of predictions, their exact match and its 95 % interval."""
    hits = [is_exact(p) for p in predictions]
    return {"n": len(hits), "exact_match": mean(hits), "intervals": {"exact_match": wilson(hits)}}


def undefined(predictions: list[Prediction]) -> dict[str, str]:
    """The metrics in which even the references would score 0, each with the reason."""
    ngrams = [_reference_ngrams(p) for p in predictions]
    reasons = {}
    if max(map(len, frozenset().union(*ngrams)), default=0) < 4:
        reasons["bleu"] = "no reference has four words"
    if len(set(ngrams)) == 1:
        reasons["cider"] = "no question has words in its references that another has not"
    return reasons


def score_group(predictions: list[Prediction]) -> dict[str, Any]:
    """Every metric that is not `undefined`, and the 95 % interval of each that is a mean over questions."""
    scores, reasons = score_exact(predictions), undefined(predictions)
    # One score for each question that has what the metric needs
    answered = [p for p in predictions if p["answers"]]
    by_question = {
        "token_f1": [token_f1(p) for p in predictions],
        "rouge_l": [rouge_l(p) for p in predictions],
        "cider": [] if "cider" in reasons else cider(predictions),
        "vqa_accuracy": [vqa_accuracy(p) for p in answered],
        "anls": [anls(p) for p in answered],
        "iou_50": [score for p in predictions if (score := box_accuracy(p)) is not None],
        "pointing": [score for p in predictions if (score := pointing_accuracy(p)) is not None],
    }
    for metric, values in by_question.items():
        if values:
            scores[metric] = mean(values)
            scores["intervals"][metric] = bootstrap(values)
    # One score for all questions together
    if "bleu" not in reasons:
        scores["bleu"] = bleu(predictions)
    return scores | ({"undefined": reasons} if reasons else {})


def score_choices(predictions: list[Prediction]) -> dict[str, Any]:
    """The accuracy of the likeliest choice, and whether its share tells how often it is right; see `add_choices`.

    `calibration_error` is the expected one (Guo et al., 2017) over ten `bins`: mean share, accuracy, number. `auroc`,
    where all have the same two choices: how often one has the larger share where it is right than where it is not.
    """
    hits = np.array([is_exact(p | {"prediction": next(iter(p["likely"]))}) for p in predictions])
    shares, bins = np.array([max(p["likely"].values()) for p in predictions]), []
    for number in range(10):
        inside = np.minimum(shares * 10, 9).astype(int) == number
        bins += [[shares[inside].mean(), hits[inside].mean(), int(inside.sum())]] if inside.any() else []
    error = sum(n * abs(share - right) for share, right, n in bins) / len(hits)
    scores = {"n": len(hits), "accuracy": hits.mean(), "interval": wilson(hits.tolist()), "calibration_error": error}
    one, *others = sorted(predictions[0]["likely"])
    if len(others) == 1 and all(sorted(p["likely"]) == [one, *others] for p in predictions):
        is_right = np.array([is_exact(p | {"prediction": one}) for p in predictions])
        of_one = np.array([p["likely"][one] for p in predictions])
        steps = np.sign(np.subtract.outer(of_one[is_right], of_one[~is_right]))
        scores |= {"auroc": (steps.mean() + 1) / 2} if steps.size else {}
    return scores | {"bins": bins}


def by_group(predictions: Iterable[Prediction], score: Callable[[list[Prediction]], dict[str, Any]]) -> dict[str, Any]:
    """The scores of all predictions and, under `by_language` and `by_kind`, those of each language and kind.

    A group needs all questions to name theirs. Languages are sorted; kinds are in the order of the questions.
    """
    predictions = list(predictions)
    scores = score(predictions)
    for field in ("language", "kind"):
        groups: dict[str, list[Prediction]] = {}
        for p in predictions:
            groups.setdefault(p.get(field), []).append(p)
        if None not in groups:
            names = sorted(groups) if field == "language" else groups
            scores[f"by_{field}"] = {name: score(groups[name]) for name in names}
    return scores


def most_frequent_answer(predictions: list[Prediction]) -> list[Prediction]:
    """The same questions, each answered with the reference that is right most often in its language and kind."""
    counts: dict[tuple[str, str], Counter] = {}
    for p in predictions:
        counts.setdefault((p["language"], p.get("kind")), Counter()).update(list(dict.fromkeys(references(p))))
    return [p | {"prediction": counts[p["language"], p.get("kind")].most_common(1)[0][0]} for p in predictions]


def difference(predictions: list[Prediction], others: list[Prediction]) -> tuple[float, list[float]]:
    """The difference of two runs' exact match on the same questions, and its 95 % interval."""
    steps = [float(is_exact(a)) - float(is_exact(b)) for a, b in zip(predictions, others, strict=True)]
    return mean(steps), bootstrap(steps)


def read_metrics(folder: Path) -> dict[str, Any]:
    """The `metrics.json` of an evaluation's folder; a ValueError if evaluate has not written one."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        for scores in (metrics, *metrics.get("by_language", {}).values()):
            low, high = scores["intervals"]["exact_match"]
            numbers = [scores["n"], scores["exact_match"], low, high]
            sum([*numbers, *(scores[name] for name in METRICS if name in scores)])  # all have to be numbers
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} holds no metrics.json that evaluate wrote: {error!r}") from error
    return metrics
