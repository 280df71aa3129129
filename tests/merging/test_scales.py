"""Scales are fitted to the outputs of the layers: by least squares, row by row, in one pass where memory allows it."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from testbed.random_deltas import random_delta
from testbed.searching import NAMES, objective_on, same_bits, state

from modular_experts.base.apply import applied
from modular_experts.deltas import Dense, LowRank
from modular_experts.evaluation import batch_losses
from modular_experts.evaluation.gram import gram
from modular_experts.library import make_record, write_expert
from modular_experts.library.form import Form
from modular_experts.merging.shrink import FURTHEST, fitted_factors, row_factors, shrink
from modular_experts.methods.method import DataStatistic

KINDS = ["Dense", "Sparse", "BlockSparse"]
SIGNS = Form("sign", 0.5)


@pytest.fixture(scope="module")
def objective(tiny_llama_dir, task_files):
    return objective_on(tiny_llama_dir, task_files, sharpness=5)


def _inputs(count: int, width: int, seed: int) -> torch.Tensor:
    """Return inputs of very different sizes that go along with each other, float64 `(count, width)`."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=draw, dtype=torch.float64) * torch.linspace(0.1, 2, width)
    return torch.randn(count, width, generator=draw, dtype=torch.float64) @ mixed


def _statistic(inputs: torch.Tensor, along: int = 1) -> DataStatistic:
    return DataStatistic(inputs.T @ inputs / len(inputs), inputs=along)


def _coded(delta):
    return SIGNS.read(SIGNS.cut(delta)).to(dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_is_the_solution_of_least_squares(kind) -> None:
    delta, inputs = random_delta(kind, (12, 10), 0, share=0.8), _inputs(40, 10, 1)
    coded = _coded(delta)
    found = row_factors(delta, coded, _statistic(inputs))
    wanted = [
        torch.linalg.lstsq((inputs @ own)[:, None], (inputs @ row)[:, None]).solution.item() if own.any() else 1.0
        for own, row in zip(coded.dense(), delta.dense(), strict=True)
    ]
    exact = torch.tensor(wanted, dtype=torch.float64).clamp(1 / FURTHEST, FURTHEST)
    assert exact.std() > 0.05
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_inputs_share_one_factor(kind) -> None:
    delta, inputs = random_delta(kind, (10, 12), 0, share=0.8), _inputs(40, 10, 1)
    coded = _coded(delta)
    (found,) = row_factors(delta, coded, _statistic(inputs, along=0))
    own, wanted = ((inputs @ part.dense()).view(-1, 1) for part in (coded, delta))
    torch.testing.assert_close(found.view(1, 1), torch.linalg.lstsq(own, wanted).solution, rtol=1e-9, atol=1e-9)


def test_a_row_without_outputs_keeps_its_scale() -> None:
    delta = Dense(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    coded = Dense(torch.tensor([[2.0, 2.0], [0.0, 0.0]]))
    assert row_factors(delta, coded, _statistic(torch.zeros(3, 2))).tolist() == [1, 1]
    assert row_factors(delta, coded, _statistic(torch.tensor([[0.0, 1.0]]))).tolist() == [1.5, 1]


@contextmanager
def _counted(model):
    """Yield a list that gets an entry for each pass of the model."""
    passes = []
    handle = model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    yield passes
    handle.remove()


def test_layers_of_the_expert_give_the_inputs_and_passes_fit_the_memory_of_the_model() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes)).eval()
    batches = [{"input_ids": torch.randint(40, (2, 6)), "attention_mask": torch.ones(2, 6).long()} for _ in range(3)]
    names = [name for name, _ in model.named_parameters() if "proj" in name]
    deltas = {name: Dense(0.1 * torch.randn_like(model.get_parameter(name))) for name in names}
    coded = {name: SIGNS.read(delta) for name, delta in deltas.items()}
    before = state(model)
    with _counted(model) as passes:
        (found,) = fitted_factors(model, batches, deltas, [coded.__getitem__])
        assert fitted_factors(model, batches, deltas, []) == []
    assert same_bits(model, before)
    # The Gram matrix of each down_proj is larger than the model; the other ones are small.
    assert len(passes) == 4 * len(batches)
    with applied(model, deltas, check=False):
        grams = gram(model, batches, names)
    for name in names:
        torch.testing.assert_close(found[name], row_factors(deltas[name], coded[name], grams[name]))


def test_biases_norms_embeddings_and_low_rank_deltas_are_left(objective) -> None:
    model = objective.model
    others = ["model.norm.weight", "model.embed_tokens.weight"]
    deltas = {name: Dense(torch.randn_like(model.get_parameter(name))) for name in others}
    shape = model.get_parameter(NAMES[0]).shape
    deltas |= {NAMES[0]: LowRank(torch.randn(shape[0], 2), torch.randn(2, shape[1]))}
    assert fitted_factors(model, objective.batches["upper"], deltas, [deltas.__getitem__]) == [{}]


@pytest.fixture(scope="module")
def trained(objective):
    """A full expert of the first task, after a hundred steps of Adam on the rows that are measured."""
    model = objective.model
    weights = {name: model.get_parameter(name) for name in NAMES}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), 2e-3)
    for _ in range(50):
        for batch in objective.batches["upper"]:
            sums, counts = batch_losses(model, batch)
            optimizer.zero_grad()
            (sums.sum() / counts.sum()).backward()
            optimizer.step()
    deltas = {name: Dense((weight.detach() - start[name]).clone()) for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(start[name])
    return deltas


def test_a_trained_expert_loses_less_in_equally_many_bytes(objective, trained, tmp_path) -> None:
    base = {"id": "base", "revision": None, "fingerprint": "f" * 64}
    expert = write_expert(tmp_path / "library/own", trained.items(), make_record("FullExpert", base, tasks=["upper"]))
    form = Form("sign")
    (done,) = shrink([tmp_path / "library/own"], objective, tmp_path / "small", form, bound=10.0)
    as_it_was = objective.losses_with({n: form.read(delta) for n, delta in trained.items()}, tasks=["upper"])["upper"]
    assert done.before.loss < done.chosen.loss < done.before.loss + 0.8 * (as_it_was - done.before.loss), expert
    assert done.expert.record["source"]["format"] == "shrunk to sign, scales fitted to outputs"
    fine = Form("int4")
    (done,) = shrink([tmp_path / "library/own"], objective, tmp_path / "fine", fine, bound=10.0)
    assert done.expert.record["source"]["format"] == "shrunk to int4"
    assert torch.equal(done.expert[NAMES[0]].values, fine.read(trained[NAMES[0]]).values)
