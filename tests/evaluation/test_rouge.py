"""Rouge-L by hand, in English and in scripts that the usual normaliser throws away."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.text import ROUGEScore

from modular_experts.evaluation.metrics import rouge_l, stemmed_rouge_l, text_metrics, words


@pytest.mark.parametrize(
    ("generated", "target", "score"),
    [
        ("The cat, sat!", "the cat sat", 1.0),
        ("police kill the gunman", "police killed the gunman", 0.75),  # common: police the gunman; 3/4 and 3/4
        ("the gunman police killed", "police killed the gunman", 0.5),  # 2/4 and 2/4
        ("a b c d e f", "a c e", 2 * (3 / 6) * 1.0 / (3 / 6 + 1.0)),
        ("", "y", 0.0),
        ("...", "y", 0.0),
        ("我爱北京", "我爱上海", 0.5),  # two of four characters
        ("नमस्ते दुनिया", "नमस्ते", 2 * 0.5 / 1.5),
    ],
)
def test_rouge_l_by_hand(generated: str, target: str, score: float) -> None:
    assert rouge_l(generated, target) == pytest.approx(score, abs=1e-6)


def test_words_keep_marks_and_cut_ideographs() -> None:
    assert words("Ünïted_St4tes-नमस्ते, 北京!") == ["ünïted", "st4tes", "नमस्ते", "北", "京"]


@given(*[st.text("ab c-D,1_", max_size=25)] * 2)
def test_on_plain_text_it_is_the_usual_score(generated: str, target: str) -> None:
    usual = ROUGEScore(rouge_keys=("rougeL",))(generated, target)["rougeL_fmeasure"]
    assert rouge_l(generated, target) == pytest.approx(float(usual), abs=1e-6)


@given(*[st.lists(st.sampled_from(["run", "running", "The", "cats", "cat", "happily", "happy"])).map(" ".join)] * 2)
def test_stemmed_it_is_the_score_of_the_papers_evaluation(generated: str, target: str) -> None:
    theirs = ROUGEScore(use_stemmer=True, rouge_keys=("rougeL",))(generated, target)["rougeL_fmeasure"]
    assert stemmed_rouge_l(generated, target) == pytest.approx(float(theirs), abs=1e-6)


def test_metrics_stand_beside_the_usual_ones_or_in_their_place() -> None:
    def same_length(generated: str, target: str) -> float:
        return float(len(generated) == len(target))

    assert [*text_metrics({"same_length": same_length})] == ["exact_match", "rougeL", "same_length"]
    assert text_metrics({"rougeL": same_length})["rougeL"] is same_length
    with pytest.raises(ValueError, match=r"metrics\.mine returned None for two texts; a metric must return a number"):
        text_metrics({"mine": lambda generated, target: None})
