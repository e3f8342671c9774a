"""Metrics against values by hand or by the programs that defined them; comparison of runs."""

import json

import pytest
from PIL import Image

from train_llava import evaluate
from train_llava.evaluation import metrics


def said(prediction: str, *references: str, language: str | None = None, answers: tuple[str, ...] = ()) -> dict:
    right = {"reference": references[0], "references": list(references)}
    return {"prediction": prediction, "language": language, "answers": list(answers)} | right


CAPTIONS = [
    said("a man riding a horse", "a man rides a brown horse"),
    said("two dogs", "Two dogs."),
    said("the cat sleeps on a red sofa", "a cat sleeps on the sofa"),
]


def test_a_word_stands_between_spaces_or_is_one_chinese_character():
    assert metrics.words("It's a Bird, 2 of them! 鸟儿well_done") == ["it's", "a", "bird", "2", "of", "them", *"鸟儿",
                                                                      "well", "done"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("चीता और चिता", ["चीता", "और", "चिता"]),
        ("ดำ, ดี", ["ดำ", "ดี"]),
        ("كِتَاب", ["كِتَاب"]),
        ("Tiê\u0301ng Viê\u0323t", ["tiếng", "việt"]),
        ("ภาษาไทย น้ำ ๑๒", [*"ภาษาไทย", "น้ำ", "๑๒"]),
        ("ພາສາ", [*"ພາສາ"]),
        ("ភាសាខ្មែរ។", ["ភា", "សា", "ខ្មែ", "រ"]),
        ("မြန်မာ။", ["မြ", "န်", "မ", "ာ"]),
        ("か\u3099 1\ufe0f\u20e3 ♥\ufe0f", ["が", "1\ufe0f\u20e3"]),
    ],
)
def test_words_keep_their_combining_marks(text, expected):
    assert metrics.words(text) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Straße", "STRASSE"),
        ("İstanbul", "istanbul"),
        ("１２ Ａ", "12 a"),
        ("It’s", "it's"),
        ("l´eau", "l'eau"),
        ("ﬁne", "fine"),
        ("ΣΊΣΥΦΟΣ", "Σίσυφος"),
        ("ｶﾞ", "ガ"),
        ("ใน\u0e19\u0e49\u0e4d\u0e32", "ในน้ำ"),
    ],
)
def test_spellings_of_a_word_count_as_one(one, other):
    assert metrics.words(one) == metrics.words(other) != []
    assert metrics.token_f1(said(one, other)) == metrics.rouge_l(said(one, other)) == 1


def test_the_two_encodings_of_an_accent_count_as_one():
    for score in (metrics.token_f1, metrics.rouge_l, metrics.is_exact):
        assert score(said("caf\u00e9", "cafe\u0301")) == 1
        assert score(said("चीता", "चिता")) == 0


def test_token_f1_counts_shared_words():
    # 3 shared of 5 and 5, where "a" stands twice on both sides; all; 6 shared of 7 and 6
    assert [metrics.token_f1(p) for p in CAPTIONS] == pytest.approx([2 * 4 / 11, 1, 2 * 6 / 13])
    assert metrics.token_f1(said("", "a dog")) == metrics.token_f1(said("", "")) == 0


def test_rouge_l_is_the_f_score_of_the_longest_common_subsequence():
    # "a man … a … horse", 4 of 5 and 6; all; "cat sleeps on … sofa", 4 of 7 and 6
    assert [metrics.rouge_l(p) for p in CAPTIONS] == pytest.approx([8 / 11, 1, 8 / 13])
    assert metrics.rouge_l(said("红色的圆", "红色的方块")) == pytest.approx(2 * 3 / 9)


def test_cider_equals_the_program_of_its_authors():
    # pycocoevalcap 1.2, Cider().compute_score on the same words
    assert metrics.cider(CAPTIONS) == pytest.approx([2.11449632, 5.0, 3.70727648])


COCO = [
    said("a man riding a horse", "a man rides a brown horse", "a man on a horse", "someone riding a horse in a field"),
    said("two dogs", "Two dogs.", "two dogs play in the snow"),
    said("the cat sleeps on a red sofa", "a cat sleeps on the sofa", "a cat on a red sofa",
         "the cat sleeps on a red couch in a room"),
]  # fmt: skip


def test_an_answer_may_have_several_references():
    # pycocoevalcap 1.2, CiderScorer and BleuScorer on the same words
    assert metrics.cider(COCO) == pytest.approx([2.91446696, 3.64363294, 4.80637187])
    assert metrics.bleu(COCO) == pytest.approx(0.82109674)
    # the best: 4 of 5 and 5; all; 5 of 7 and 6
    assert list(map(metrics.rouge_l, COCO)) == pytest.approx([4 / 5, 1, 10 / 13])
    assert list(map(metrics.token_f1, COCO)) == pytest.approx([4 / 5, 1, 12 / 13])
    assert metrics.is_exact(said("a dog", "one dog", "a dog"))


def test_bleu_counts_runs_of_words_over_all_answers():
    assert metrics.bleu([said("the cat sat on the mat", "the cat sat on the mat")]) == pytest.approx(1)
    # pycocoevalcap 1.2 has the same precisions 12/14, 4/11 and 1/8; of runs of four, none in 6, sacrebleu takes a half
    assert metrics.bleu(CAPTIONS) == pytest.approx((12 / 14 * 4 / 11 * 1 / 8 * 0.5 / 6) ** 0.25, abs=1e-6)


def vqa(prediction: str, *answers: str) -> float:
    return metrics.vqa_accuracy(said(prediction, answers[0], answers=answers))


def test_vqa_accuracy_asks_three_of_ten_people():
    # with one of the two left out the other is a third; with someone else left out both are two thirds
    assert vqa("A dog.", *["dog"] * 2, *["cat"] * 8) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa("dog", *["cat"] * 10) == 0
    assert vqa("dog", *["The dog"] * 5, *["dog"] * 5) == 1
    assert (vqa("dog", "dog"), vqa("dog", "dog", "a dog"), vqa("dog", "cat")) == (1, 1, 0)
    # where all wrote the same, texts count as they are
    assert [vqa(text, *["A"] * 10) for text in ("", "a", " A\n")] == [0, 0, 1]


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Coca  Cola", ["coca cola"], 1),
        ("coka cola", ["pepsi", "Coca Cola"], 8 / 9),
        ("cat", ["cart", "dog"], 3 / 4),
        ("ab", ["ac"], 0),  # a half is changed
        ("abc", ["abd"], 2 / 3),
        ("", ["a"], 0),
        ("图书馆", ["图书室", "楼"], 2 / 3),
    ],
)
def test_anls_is_the_share_of_letters_that_stay(prediction, answers, expected):
    """By hand from Biten et al., 2019, with their threshold of 0.5."""
    assert metrics.anls(said(prediction, answers[0], answers=tuple(answers))) == pytest.approx(expected)


def test_a_metric_that_the_references_cannot_reach_is_left_out_with_its_reason():
    """Right answers of one word, one question, and texts without a word would score 0."""
    short = metrics.score_group([said("yes", "yes"), said("no", "no")])
    assert short["undefined"] == {"bleu": "no reference has four words"}
    assert "bleu" not in short
    assert short["cider"] == pytest.approx(2.5)
    alone = metrics.score_group([said("the cat sat on the mat", "the cat sat on the mat")])
    assert alone["undefined"].keys() == {"cider"}
    assert alone["bleu"] == pytest.approx(1)
    for predictions in ([said("♥", "♥"), said("!", "?")], [said("a b", "yes"), said("no", "yes")]):
        scores = metrics.score_group(predictions)
        assert scores["undefined"].keys() == {"bleu", "cider"} == {"bleu", "cider"} - scores.keys()
    assert "undefined" not in metrics.score_group(CAPTIONS)


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("1,000", "1000", True),
        ("1,000 p.m., (red)", "1000 pm red", True),
        ("5 p.m.", "5 pm", True),
        ("U.S.", "us", True),
        ("dont", "don't", True),
        ("shouldntve", "shouldn't've", False),  # it lacks both
        ("shouldn'tve", "shouldn't've", True),
        ("lets", "let's", False),
        ("none", "0", True),
        ("Two", "2", True),
        ("3.5", "35", False),
        ("-5", "5", True),
        ("t-shirt", "t shirt", True),
        ("top - left", "top left", True),
        ("top- left", "topleft", False),
        ("black,white", "black white", True),
        ("an apple!", "Apple", True),
        ("$5", "5", False),
        ("10:30", "1030", False),
    ],
)
def test_vqa_accuracy_follows_the_rules_of_the_challenge(prediction, answer, same):
    """Each is what the challenge's own program gives (GT-Vision-Lab/VQA, a013f00)."""
    assert vqa(prediction, *[answer] * 9, "other") == same


def test_scores_by_language():
    rows = [("en", "a", "a"), ("en", "b", "c"), ("zh", "好", "好"), ("zh", "好", "好 "), ("zh", "不", "好")]
    predictions = [said(answer, reference, language=language) for language, reference, answer in rows]
    scores = metrics.by_group(predictions, metrics.score_group)
    found = {name: (s["exact_match"], s["n"]) for name, s in {"all": scores, **scores["by_language"]}.items()}
    assert found == {"all": (0.6, 5), "en": (0.5, 2), "zh": (2 / 3, 3)}
    # of 3 in 5
    assert scores["intervals"]["exact_match"] == pytest.approx([0.2307, 0.8824], abs=1e-4)
    assert "vqa_accuracy" not in scores
    constant = metrics.by_group(metrics.most_frequent_answer(predictions), metrics.score_group)["by_language"]
    assert (constant["en"]["exact_match"], constant["zh"]["exact_match"]) == (0.5, 2 / 3)
    several = [said("", text, "a cat") for text in ("a", "b", "b")]  # "a cat" is right three times, "b" twice
    assert metrics.score_exact(metrics.most_frequent_answer(several))["exact_match"] == 1


def test_scores_by_kind():
    rows = [("is there", "yes", "yes"), ("is there", "no", "yes"), ("where", "left", "left"), ("is there", "no", "no")]
    predictions = [said(told, right, language="en") | {"kind": kind} for kind, right, told in rows]
    scores = metrics.by_group(predictions, metrics.score_exact)
    constant = metrics.by_group(metrics.most_frequent_answer(predictions), metrics.score_exact)
    found = {kind: (of_kind["exact_match"], of_kind["n"]) for kind, of_kind in scores["by_kind"].items()}
    assert found == {"is there": (2 / 3, 3), "where": (1, 1)}
    # "no" and "left", each the most frequent answer of its kind
    assert constant["by_kind"]["is there"]["exact_match"] == 2 / 3
    assert constant["exact_match"] == 3 / 4
    whole = metrics.by_group(predictions, metrics.score_group) | {"controls": {"most_frequent_answer": constant}}
    (line,) = [line for line in evaluate.table(whole).splitlines() if line.startswith("  is there")]
    assert line.split() == ["is", "there", "66.7%", "20.8%-93.9%", "66.7%"]
    # Not every question names its kind
    assert "by_kind" not in metrics.by_group([*predictions, said("a", "a", language="en")], metrics.score_exact)


def test_a_metric_of_one_language_has_an_empty_cell_for_the_other():
    predictions = [said("red", "red", language="en", answers=("red",) * 10), said("红", "红", language="zh")]
    scores = metrics.by_group(predictions, metrics.score_group) | {"controls": {}}
    (row,) = [line for line in evaluate.table(scores).splitlines() if "VQA accuracy" in line]
    assert row == f"{'  VQA accuracy':<22}{'100.0%':>14}{'':>14}{'100.0%':>14}"


def test_a_bootstrap_interval_holds_the_mean_and_narrows_with_more_questions():
    low, high = metrics.bootstrap([0.0, 1.0] * 200)
    # two standard errors of a half in 400
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.01)
    assert metrics.bootstrap([0.5] * 10) == [0.5, 0.5]


@pytest.fixture
def runs(tmp_path):
    """Two evaluations of the same 40 questions, and one of others."""
    for name, hits, questions in (("first", 20, 40), ("second", 30, 40), ("other", 3, 5)):
        predictions = [
            said("yes" if i < hits else "no", "yes") | {"id": str(i), "prompt": "?"} for i in range(questions)
        ]
        (tmp_path / name).mkdir()
        scores = metrics.by_group(predictions, metrics.score_group)
        (tmp_path / name / "metrics.json").write_text(json.dumps(scores))
        lines = [json.dumps({key: p[key] for key in ("id", "prompt", "reference", "prediction")}) for p in predictions]
        (tmp_path / name / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_runs_are_compared_question_by_question(runs):
    out = runs / "comparison"
    out.mkdir()
    lines = evaluate.compare([runs / "first", runs / "second"], out).splitlines()
    assert len(lines) == 4
    assert "exact match, less that of" in lines[0]
    assert [line.split(" | ")[1] for line in lines[2:]] == ["50.0%", "75.0%"]
    # ten of forty more: two standard errors are 14 in a hundred
    assert "+25.0% (+12.5% to +40.0%)" in lines[3] or "+25.0% (+12.5% to +37.5%)" in lines[3]
    assert (out / "comparison.md").read_text().startswith(lines[0])
    assert Image.open(out / "comparison.png").size[0] > 600


def test_settings_that_differ_are_named_in_a_line_each(runs):
    for name, settings in (("first", {"bits": None, "torch": "2"}), ("second", {"bits": 4, "torch": "2"})):
        path = runs / name / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": settings}))
    text = evaluate.compare([runs / "first", runs / "second"], runs)
    assert text.splitlines()[4:] == ["", f"bits differs: None in {runs / 'first'}, 4 in {runs / 'second'}"]
    assert text in (runs / "comparison.md").read_text()
    (runs / "first" / "metrics.json").write_text(json.dumps(json.loads(path.read_text()) | {"settings": {}}))
    text = evaluate.compare([runs / "first", runs / "second"], runs)  # one of an earlier version
    assert [line.split(" in ")[0] for line in text.splitlines()[5::2]] == [
        "bits differs: unknown",
        "torch differs: unknown",
    ]


def test_runs_over_different_questions_are_not_compared(runs):
    with pytest.raises(ValueError, match="were asked different questions"):
        evaluate.compare([runs / "first", runs / "other"], runs)
    predictions = runs / "second" / "predictions.jsonl"  # records without ids, in another order
    predictions.write_text(predictions.read_text().replace('"reference": "yes"', '"reference": "no"', 1))
    with pytest.raises(ValueError, match="or of other right answers"):
        evaluate.compare([runs / "first", runs / "second"], runs)
