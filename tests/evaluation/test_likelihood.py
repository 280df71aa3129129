"""The loss of a row is the float64 log-softmax of its labelled tokens, added up by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model, build_tokenizer

from modular_experts.data.batch import IGNORED, Collator
from modular_experts.data.rows import Row
from modular_experts.data.tokenize import RowTokenizer
from modular_experts.evaluation import (
    answer_logits,
    batch_losses,
    choice_log_likelihoods,
    greedy_matches,
    row_losses,
)


class Whole(torch.nn.Module):
    """A model that makes all logits."""

    def __init__(self, logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.logits(input_ids, attention_mask))


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], list[int]]:
    likelihoods = logits.double().log_softmax(-1)
    sums, counts = [], []
    for row in range(len(labels)):
        terms = [
            -float(likelihoods[row, place, int(label)]) for place, label in enumerate(labels[row]) if label != IGNORED
        ]
        sums.append(sum(terms))
        counts.append(len(terms))
    return sums, counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_and_counts_by_row(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(4, 7, 11)).to(dtype)
    labels = torch.randint(0, 11, (4, 7))
    labels[0, :3] = labels[1, 5:] = IGNORED
    labels[2] = IGNORED
    sums, counts = row_losses(logits, labels)
    wanted, numbers = by_hand(logits, labels)
    assert counts.tolist() == numbers == [4, 5, 0, 7]
    assert sums.tolist() == pytest.approx(wanted, rel=1e-12 if dtype == torch.float64 else 1e-6)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_gradients_are_those_of_the_usual_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 9, (2, 5))
    labels[0, :3] = IGNORED
    sums, counts = row_losses(logits, labels)
    (mine,) = torch.autograd.grad(sums.sum() / counts.sum(), logits)
    usual = torch.nn.functional.cross_entropy(logits.reshape(-1, 9), labels.reshape(-1))
    (theirs,) = torch.autograd.grad(usual, logits)
    torch.testing.assert_close(mine, theirs)


def test_choices_are_scored_one_by_one_or_together_the_same() -> None:
    model = build_model("llama")
    rows = [Row("pick", "a", choices=("a", "bcd", "e")), Row("a longer prompt", "z", choices=("y", "z"))]
    batch = Collator(pad_id=0)(RowTokenizer(build_tokenizer())("t", rows)[0])
    scores = choice_log_likelihoods(model, batch["choices"], rows=2)
    for number in range(5):
        length = int(batch["choices"]["attention_mask"][number].sum())
        ids, labels = (batch["choices"][key][number : number + 1, :length] for key in ("input_ids", "labels"))
        with torch.no_grad():
            wanted, _ = by_hand(model(input_ids=ids).logits[:, :-1], labels[:, 1:])
        assert float(scores[number]) == pytest.approx(-wanted[0], rel=1e-5)


def test_a_choice_is_scored_with_its_end() -> None:
    batch = Collator(pad_id=0)(RowTokenizer(build_tokenizer())("t", [Row("p", "ab", choices=("ab", "c"))])[0])
    scores = choice_log_likelihoods(Whole(lambda ids, mask: torch.zeros(*ids.shape, 200).double()), batch["choices"])
    assert scores.tolist() == pytest.approx([-4 * math.log(200), -3 * math.log(200)])  # space, letters, end


def test_the_head_is_asked_for_the_answers_alone_and_gets_them_in_one_piece() -> None:
    model = build_model("llama")
    batch = Collator(pad_id=0)(RowTokenizer(build_tokenizer())("t", [Row("pre", "ab"), Row("longer", "c")])[0])
    got = []
    model.lm_head.register_forward_pre_hook(lambda head, inputs: got.append(inputs[0]))
    logits, labels = answer_logits(model, batch)
    first = int((batch["labels"] != IGNORED).nonzero()[:, 1].min()) - 1
    assert first == 2
    assert got[0].shape[:2] == labels.shape == (2, batch["labels"].shape[1] - first)
    assert got[0].is_contiguous()
    assert torch.equal(labels[:, :-1], batch["labels"][:, first + 1 :])
    assert (labels[:, -1] == IGNORED).all()
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, whole[:, first:])


def test_a_model_that_makes_all_logits_gives_the_same() -> None:
    model = build_model("llama")
    batch = Collator(pad_id=0)(RowTokenizer(build_tokenizer())("t", [Row("p", "ab"), Row("longer", "c")])[0])

    whole = Whole(lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits)
    for found, wanted in zip(batch_losses(whole, batch), batch_losses(model, batch), strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.equal(greedy_matches(whole, batch), greedy_matches(model, batch))


def test_a_row_without_an_answer_does_not_cost_the_others_anything() -> None:
    batch = Collator(pad_id=0)(RowTokenizer(build_tokenizer())("t", [Row("longer", "ab"), Row("prompt", "c")])[0])
    one = batch["labels"].clone()
    one[1] = IGNORED
    logits, labels = answer_logits(build_model("llama"), batch | {"labels": one})
    assert logits.shape[:2] == labels.shape == (2, 5)  # space, two letters, the end, and the last place
    assert (labels[1] == IGNORED).all()


def test_without_an_answer_nothing_is_summed() -> None:
    model = build_model("llama")
    batch = Collator(pad_id=0)(RowTokenizer(build_tokenizer())("t", [Row("p", "ab")])[0])
    sums, counts = batch_losses(model, batch | {"labels": torch.full_like(batch["labels"], IGNORED)})
    assert sums.tolist() == [0.0]
    assert counts.tolist() == [0]
