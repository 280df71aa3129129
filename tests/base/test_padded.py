"""Experts of a base serve the same base with further rows of the vocabulary, and no other."""

import logging

import pytest
import torch
from conftest import build_model, build_tokenizer
from testbed.random_deltas import random_delta
from transformers import AutoModelForCausalLM

from modular_experts import apply, evaluate, merge
from modular_experts.base import Base
from modular_experts.deltas import Delta, Dense
from modular_experts.evaluation.compare import open_models
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.merging.merged import Merged
from modular_experts.merging.remove import remove
from modular_experts.methods import TaskArithmetic

QUERY, EMBEDDINGS, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
FORMS = {QUERY: "LowRank", EMBEDDINGS: "Sparse", HEAD: "BlockSparse"}
MORE = 5


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def bases(request, tmp_path_factory):
    """A base, and the same with further rows; whether the embeddings are the head."""
    folder = tmp_path_factory.mktemp("bases")
    model = build_model("llama", tie_word_embeddings=request.param)
    for name in ("small", "padded"):
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
        model.resize_token_embeddings(model.config.vocab_size + MORE)
    return folder / "small", folder / "padded"


def write(place, base, seed: int = 0, forms=FORMS) -> dict[str, Delta]:
    """Write an expert of a base that moves the weights of some names, and return its deltas."""
    found = Base.open(base)
    deltas = {
        name: random_delta(form, found.structure.shapes[name], seed)
        for name, form in forms.items()
        if found.structure.owners[name] == name
    }
    write_expert(place, deltas, make_record("made", found.facts, ["upper"]))
    return deltas


def in_all_rows(delta: Delta, rows: int) -> torch.Tensor:
    dense = delta.dense().double()
    return torch.cat([dense, dense.new_zeros(rows - len(dense), *dense.shape[1:])]) if len(dense) < rows else dense


def test_a_merge_takes_experts_of_both(bases, tmp_path, caplog) -> None:
    few = write(tmp_path / "few", bases[0], 0, FORMS | {QUERY: "Dense"})
    many = write(tmp_path / "many", bases[1], 1)
    with caplog.at_level(logging.WARNING):
        merge([tmp_path / "few", tmp_path / "many"], TaskArithmetic(scale=1.0), tmp_path / "merged")
    left = remove(tmp_path / "merged", tmp_path / "few", tmp_path / "left")
    for name, delta in many.items():
        torch.testing.assert_close(left[name].dense().double(), delta.dense().double(), atol=1e-5, rtol=1e-4)
    found, more = open_expert(tmp_path / "merged"), Base.open(bases[1])
    assert f"{bases[1]} is the same with {MORE} more rows of the vocabulary" in caplog.text
    assert found.record["base"] == more.facts
    for name, delta in many.items():
        wanted = in_all_rows(few[name], len(delta.dense())) + delta.dense().double()
        torch.testing.assert_close(found[name].dense().double(), wanted, rtol=1e-5, atol=1e-6)
        assert found.shapes()[name] == more.structure.shapes[name]
    assert found[EMBEDDINGS].dense()[-MORE:].any()


@pytest.mark.parametrize("form", ["LowRank", "Sparse"])
def test_apply_leaves_further_rows_as_they_are(form, bases, tmp_path) -> None:
    moved = write(tmp_path / "few", bases[0], forms=dict.fromkeys(FORMS, form))
    apply(tmp_path / "few", tmp_path / "whole", base=bases[1])
    before, after = (
        AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (bases[1], tmp_path / "whole")
    )
    for name, delta in moved.items():
        wanted = before[name].double() + in_all_rows(delta, len(before[name]))
        torch.testing.assert_close(after[name].double(), wanted, rtol=1e-6, atol=1e-6)
        assert not torch.equal(after[name], before[name])
    assert torch.equal(after[EMBEDDINGS][-MORE:], before[EMBEDDINGS][-MORE:])


def test_evaluate_measures_the_same_deltas(bases, tmp_path, task_files) -> None:
    few = write(tmp_path / "few", bases[0])
    padded = Base.open(bases[1])
    many = {name: one if name == QUERY else Dense(in_all_rows(one, padded.rows).float()) for name, one in few.items()}
    write_expert(tmp_path / "many", many, make_record("made", padded.facts, ["upper"]))
    losses = []
    for name in ("few", "many"):
        found = evaluate(bases[1], [tmp_path / name], [str(task_files["upper"])], max_new_tokens=2)
        losses.append([row["value"] for row in found.rows if row["metric"] == "loss" and row["experts"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0]


def test_a_larger_base_moves_no_expert_that_the_caller_holds(bases, tmp_path) -> None:
    for name, base in zip(("few", "many"), bases, strict=True):
        write(tmp_path / name, base)
    few, many = open_expert(tmp_path / "few"), open_expert(tmp_path / "many")
    shapes, small = few.shapes(), Base.open(bases[0])
    Merged([few, many], TaskArithmetic())
    _, (model,) = open_models(bases[1], {"few": few})
    assert model.experts[0].record["base"]["rows"] == small.rows + MORE
    assert (few.record["base"], few.shapes()) == (small.facts, shapes)
    Base.open(bases[0], [few])


def test_other_rows_or_weights_are_refused(bases, tmp_path) -> None:
    write(tmp_path / "few", bases[0])
    for name, row in ((EMBEDDINGS, 3), (QUERY, 0)):
        model = AutoModelForCausalLM.from_pretrained(bases[1])
        model.get_parameter(name).data[row, 0] += 1
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="few was trained on another base than"):
            Base.open(tmp_path / name, [open_expert(tmp_path / "few")])
    # Rows that are there in training are needed.
    write(tmp_path / "many", bases[1])
    with pytest.raises(ValueError, match="many was trained on another base than"):
        Base.open(bases[0], [open_expert(tmp_path / "many")])
