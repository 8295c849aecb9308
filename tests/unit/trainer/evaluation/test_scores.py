"""What answers are worth, held against the libraries' own numbers and against numbers counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab_trainer.evaluation import scores
from trimtab_trainer.rewards import Said


def scored(metric: Any, *pairs: tuple[str, str | None], longest: int = 10, **columns: Any) -> scores.Scored:
    """The scores of answers against references by one metric."""
    said = [Said([{"role": "user", "content": "?"}], text, range(len(text.split())), columns) for text, _ in pairs]
    return scores.score([metric], said, [wanted for _, wanted in pairs], longest)


@pytest.mark.parametrize(
    ("said", "wanted", "right"),
    [
        ("the harbour", "the harbour", 1),
        ("  the harbour\n", "the harbour", 1),
        ("The harbour", "the harbour", 0),
        ("the harbour.", "the harbour", 0),
        ("<think>east or west?</think>\n\nwest", "west", 1),
        ("no end of thoughts: east or west?</think>west", "<think>\n\n</think>\n\nwest", 1),
        ("", "west", 0),
    ],
)
def test_exact_match(said: str, wanted: str, right: int) -> None:
    assert scored("exactMatch", (said, wanted)).rows == [{"exactMatch": right}]


ENGLISH = [
    ("the ship lies in the old harbour tonight", "the ship lay in the old harbour tonight, calm"),
    ("it is late, and nobody answers", "it is late and nobody answers"),
    ("yes", "no, not at all"),
]


def test_bleu_is_sacrebleu_s() -> None:
    import sacrebleu

    found = scored("bleu", *ENGLISH)
    said, wanted = zip(*ENGLISH, strict=True)
    assert found.figures["bleu"] == pytest.approx(sacrebleu.corpus_bleu(list(said), [list(wanted)]).score)
    assert [row["bleu"] for row in found.rows] == [
        pytest.approx(sacrebleu.sentence_bleu(one, [other]).score) for one, other in ENGLISH
    ]
    assert scored("bleu", ("the cat is on the mat", "the cat is on the mat")).figures["bleu"] == pytest.approx(100)


def test_bleu_of_papineni_s_example() -> None:
    """Two of seven `the` count (Papineni et al. 2002, section 2.1): unigram precision 2/7, and nothing longer."""
    found = scored("bleu", ("the the the the the the the", "the cat is on the mat")).rows[0]["bleu"]
    # sacreBLEU halves the count of each longer order that finds nothing: 1/(2·6), 1/(4·5), 1/(8·4) (method "exp").
    assert found == pytest.approx(100 * (2 / 7 / 12 / 20 / 32) ** 0.25, rel=1e-3)


def test_rouge_is_rouge_score_s_on_latin_text() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    found = scored("rouge", *ENGLISH)
    for row, (said, wanted) in zip(found.rows, ENGLISH, strict=True):
        theirs = RougeScorer(list(scores.ROUGE)).score(wanted, said)
        assert row == {name: pytest.approx(theirs[name].fmeasure) for name in scores.ROUGE}
    assert found.figures["rougeL"] == pytest.approx(sum(row["rougeL"] or 0 for row in found.rows) / 3)


@pytest.mark.parametrize(
    ("said", "wanted", "expected"),
    [
        # Lin 2004, section 3: police kill the gunman, with "the gunman kill police" 4 words and no longer run than 2.
        ("police kill the gunman", "police killed the gunman", {"rouge1": 3 / 4, "rouge2": 1 / 3, "rougeL": 3 / 4}),
        ("the gunman kill police", "police killed the gunman", {"rouge1": 3 / 4, "rouge2": 1 / 3, "rougeL": 1 / 2}),
        ("café au lait", "cafés au lait", {"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3}),
        ("港が静か", "港は静か", {"rouge1": 3 / 4, "rouge2": 1 / 3, "rougeL": 3 / 4}),
        ("гавань тихая", "гавань тихая", {"rouge1": 1, "rouge2": 1, "rougeL": 1}),
    ],
)
def test_rouge_by_hand(said: str, wanted: str, expected: dict[str, float]) -> None:
    assert scored("rouge", (said, wanted)).rows[0] == {name: pytest.approx(value) for name, value in expected.items()}


def test_bleu_of_a_script_without_spaces() -> None:
    assert (scored("bleu", ("今晚港口很安静", "今晚港口非常安静")).figures["bleu"]) > 30
    assert scored("bleu", ("今晚港口很安静", "今晚港口很安静")).figures["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("metric", "said", "wanted", "columns", "worth"),
    [
        ("accuracy", "so it is 42", "42", {}, 1),
        ("accuracy", "it is 41", "the answer is \\boxed{42}", {}, 0),
        ("accuracy", "<think>41?</think>\\boxed{42}", "the answer is \\boxed{42}", {}, 1),
        ("accuracy", "it is 42", "forty-two", {"solution": "42"}, 1),
        ("format", "<think>a</think><answer>b</answer>", None, {}, 1),
        ("format", "b", "b", {}, 0),
        ("softOverlong", "one two three four five six seven eight nine ten", None, {}, -1),
        ("repetition", "a b c a b c", "", {}, -0.25),
        ("cosine", "42", "42", {}, pytest.approx(0.9878, abs=1e-4)),
    ],
)
def test_rewards(metric: str, said: str, wanted: str | None, columns: dict[str, Any], worth: float) -> None:
    assert scored(metric, (said, wanted), **columns).rows == [{metric: worth}]


def test_every_reward_by_name_is_a_metric() -> None:
    for name in scores.REWARDS:
        assert scored(name, ("42", "42")).figures.keys() == {name}


def test_rows_without_an_answer_count_for_nothing() -> None:
    found = scores.score(
        ["exactMatch", "accuracy", "rouge", "bleu", "repetition"],
        [Said([], text, [1]) for text in ("yes", "no", "no")],
        ["yes", "yes", None],
        8,
    )
    assert found.figures["exactMatch"] == 0.5
    assert found.figures["accuracy"] == 0.5
    assert found.rows[2] == {
        **dict.fromkeys(("exactMatch", "accuracy", "bleu", *scores.ROUGE)), "repetition": 0,
    }  # fmt: skip
    assert scores.score(["exactMatch"], [Said([], "yes", [1])], [None], 8).figures == {}
