"""The loss of a row is the float64 log-softmax of its labelled tokens, added up by hand."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, GROUPED, build_model, build_tokenizer

from modular_experts.data.batch import IGNORED, Collator
from modular_experts.data.row_tokenizer import RowTokenizer
from modular_experts.data.rows import Row
from modular_experts.evaluation import answer_logits, batch_losses, choice_log_likelihoods, greedy_matches


class Whole(torch.nn.Module):
    """A model that makes all logits."""

    def __init__(self, logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.logits(input_ids, attention_mask))


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], list[int]]:
    terms = [
        [-float(row[place, int(label)]) for place, label in enumerate(own) if label != IGNORED]
        for row, own in zip(logits.double().log_softmax(-1), labels, strict=True)
    ]
    return [sum(row) for row in terms], [len(row) for row in terms]


def labelled_at(places: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    labels = ids.masked_fill(~places, IGNORED)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_and_counts_by_row(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, places = (3 * torch.randn(4, 8, 11)).to(dtype), torch.ones(4, 8, dtype=torch.bool)
    places[0, :4] = places[1, 6:] = places[3, 3:5] = places[2] = False
    places[:, 0] = False
    batch = labelled_at(places, torch.randint(0, 11, (4, 8)))
    sums, counts = batch_losses(Whole(lambda ids, mask: logits), batch)
    wanted, numbers = by_hand(logits[:, :-1], batch["labels"][:, 1:])
    assert counts.tolist() == numbers == [4, 5, 0, 5]
    assert sums.tolist() == pytest.approx(wanted, rel=1e-12 if dtype == torch.float64 else 1e-6)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_gradients_are_those_of_the_usual_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 9, dtype=torch.float64, requires_grad=True)
    places = torch.ones(2, 6, dtype=torch.bool)
    places[0, :4] = places[1, 0] = False
    batch = labelled_at(places, torch.randint(0, 9, (2, 6)))
    sums, counts = batch_losses(Whole(lambda ids, mask: logits), batch)
    (mine,) = torch.autograd.grad(sums.sum() / counts.sum(), logits)
    usual = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 9), batch["labels"][:, 1:].reshape(-1))
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


def example_batch() -> dict:
    return Collator(pad_id=0)(RowTokenizer(build_tokenizer())("t", [Row("pre", "ab"), Row("longer", "c")])[0])


SCALED: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "soft caps": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=0.3, attn_implementation="eager")
    ),
    "a scale": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**GROUPED, logit_scale=0.25)),
    "a divisor": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**GROUPED, logits_scaling=3.0)),
}


def model_of(architecture: str) -> Any:
    torch.manual_seed(0)
    return (SCALED[architecture]() if architecture in SCALED else build_model(architecture)).eval().double()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SCALED])
def test_logits_are_those_of_the_whole_model_at_labelled_places(architecture: str) -> None:
    model, batch = model_of(architecture), example_batch()
    logits, labels = answer_logits(model, batch)
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    predicted = batch["labels"][:, 1:]
    torch.testing.assert_close(logits, whole[predicted != IGNORED])
    assert torch.equal(labels, predicted[predicted != IGNORED])


def test_the_head_is_asked_for_the_answers_alone_and_gets_them_in_one_piece() -> None:
    model, batch, got = build_model("llama"), example_batch(), []
    watch = model.lm_head.register_forward_hook(lambda head, inputs, output: got.append(inputs[0]))
    logits, _ = answer_logits(model, batch)
    watch.remove()
    assert got[0].shape == (1, 4 + 3, 32)  # a space, the letters and the end of each row
    assert got[0].is_contiguous()
    assert logits.shape == (7, model.config.vocab_size)
    assert model(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape, "the model is as before"


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SCALED])
def test_large_logits_are_made_in_parts_with_the_same_losses_and_gradients(architecture: str, monkeypatch) -> None:
    model, batch, rows = model_of(architecture), example_batch(), []
    head, weight = model.get_output_embeddings(), next(model.parameters())

    def found() -> tuple[torch.Tensor, torch.Tensor]:
        sums, _ = batch_losses(model, batch)
        return sums.detach(), torch.autograd.grad(sums.sum(), weight)[0]

    whole, usual = found()
    monkeypatch.setattr("modular_experts.evaluation.likelihood.HEAD_BYTES", 0)
    monkeypatch.setattr("modular_experts.evaluation.likelihood.PART", 3)
    parts, mine = found()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(mine, usual)
    watch = head.register_forward_hook(lambda head, inputs, output: rows.append(output.shape[:-1].numel()))
    found()
    watch.remove()
    changed = architecture in SCALED
    assert max(rows) == (7 if changed else 3), "the parts of a model that scales its logits would be wrong"


def test_a_model_that_makes_all_logits_gives_the_same() -> None:
    model = build_model("llama")
    batch = example_batch()
    whole = Whole(lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits)
    for found, wanted in zip(batch_losses(whole, batch), batch_losses(model, batch), strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.equal(greedy_matches(whole, batch), greedy_matches(model, batch))
    # Without an answer nothing is summed.
    sums, counts = batch_losses(model, batch | {"labels": torch.full_like(batch["labels"], IGNORED)})
    assert (sums.tolist(), counts.tolist()) == ([0.0] * 2, [0] * 2)
