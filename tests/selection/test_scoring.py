"""A scoring pass gives the dense gradients, one layer at a time, and leaves no trace."""

import weakref
from functools import partial
from types import SimpleNamespace

import conftest
import pytest
import torch
import torch.nn.functional as F
from testbed import runs

from modular_experts.data.batch import Collator, Example, Tokens
from modular_experts.experts import LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import expert_layers, inject
from modular_experts.selection.choice import selectable_layers
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.selection.scoring import ScoringPass

BATCHES = [torch.arange(start, start + 24).view(2, 12) % 90 + 3 for start in (0, 30, 55)]
PATTERN = r".*\.(q_proj|down_proj)"
KINDS = [partial(SparseExpert, keep_ratio=0.1), partial(MaskedExpert, keep_ratio=0.1)]


def _loss(model: torch.nn.Module):
    return lambda ids: model(input_ids=ids, labels=ids).loss


def _dense_gradients(batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model = conftest.build_model("llama")
    (sum(_loss(model)(ids) for ids in batches) / len(batches)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _score(model: torch.nn.Module, batches: list[torch.Tensor], budget: int = 2**30) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    ScoringPass(_loss(model), batches, budget=budget).gradient(selectable_layers(model), found.__setitem__)
    return found


@pytest.mark.parametrize(
    ("kind", "batches", "budget", "checkpointing"),
    [
        (KINDS[0], 3, 1, False),  # every layer is a group of its own
        (KINDS[1], 3, 2**30, True),  # all layers are one group
        (KINDS[0], 1, 2**30, True),
        (KINDS[1], 1, 1, False),
    ],
)
def test_gradients_are_those_of_the_dense_model(kind: partial, batches: int, budget: int, checkpointing: bool) -> None:
    model = conftest.build_model("llama").train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    inject(model, kind, PATTERN)
    found, wanted = _score(model, BATCHES[:batches], budget), _dense_gradients(BATCHES[:batches])
    assert found.keys() == {name for name, _ in expert_layers(model)}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS, ids=["sparse", "masked"])
@pytest.mark.parametrize("batches", [1, 3])
def test_a_layer_that_a_pass_calls_twice_is_scored_once_by_the_sum(batches: int, kind: partial) -> None:
    layer = torch.nn.Linear(8, 8, bias=False, dtype=torch.float64)
    dense = layer.weight.detach().clone().requires_grad_()
    model, inputs = torch.nn.Sequential(layer, torch.nn.Tanh(), layer), torch.randn(batches, 3, 8, dtype=torch.float64)
    inject(model, kind, ".*")
    scoring = ScoringPass(lambda x: model(x).square().sum(), list(inputs))
    means, squares = list[torch.Tensor](), list[torch.Tensor]()
    scoring.gradient(selectable_layers(model), lambda name, gradient: means.append(gradient))
    scoring.squared_gradient(selectable_layers(model), lambda name, square: squares.append(square))
    losses = [(torch.tanh(x @ dense.T) @ dense.T).square().sum() for x in inputs]
    wanted = torch.stack([torch.autograd.grad(loss, dense)[0] for loss in losses])
    assert len(means) == len(squares) == 1
    torch.testing.assert_close(means[0], wanted.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(squares[0], wanted.square().mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS, ids=["sparse", "masked"])
def test_autocast_scores_by_its_own_gradient_in_float32(kind: partial) -> None:
    layer, found = torch.nn.Linear(8, 8), list[torch.Tensor]()
    dense = layer.weight.detach().clone().requires_grad_()
    model = torch.nn.Sequential(layer)
    inject(model, kind, ".*")

    def loss(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).square().sum()

    x = torch.randn(3, 8)
    ScoringPass(loss, [x]).gradient(selectable_layers(model), lambda name, gradient: found.append(gradient))
    with torch.autocast("cpu", torch.bfloat16):
        F.linear(x, dense, layer.bias).square().sum().backward()
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], dense.grad)


def test_no_parameter_gets_a_gradient_and_no_probe_stays_even_where_a_loss_fails() -> None:
    model = conftest.build_model("llama")
    inject(model, partial(SparseExpert, keep_ratio=0.1), PATTERN)
    inject(model, LoRAExpert, r".*\.v_proj")
    sparse = selectable_layers(model)
    assert len(sparse) == 4
    ScoringPass(_loss(model), BATCHES).gradient(sparse, lambda name, gradient: None)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(layer.expert.probe is None for layer in sparse.values())

    def fails(batch: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        ScoringPass(fails, BATCHES).gradient(sparse, lambda name, gradient: None)
    assert all(layer.expert.probe is None for layer in sparse.values())


def test_with_one_batch_one_dense_gradient_lives_at_a_time() -> None:
    model = conftest.build_model("llama", num_hidden_layers=4)
    inject(model, partial(SparseExpert, keep_ratio=0.1), PATTERN)
    alive: set[int] = set()
    most = 0

    def receive(name: str, gradient: torch.Tensor) -> None:
        nonlocal most
        alive.add(id(gradient))
        weakref.finalize(gradient, alive.discard, id(gradient))
        most = max(most, len(alive))

    layers = selectable_layers(model)
    ScoringPass(_loss(model), BATCHES[:1]).gradient(layers, receive)
    assert len(layers) == 8
    assert most == 1


@pytest.mark.parametrize(("kind", "batches", "budget"), [(KINDS[0], 3, 1), (KINDS[1], 3, 2**30), (KINDS[1], 1, 1)])
def test_squared_gradients_are_squared_batch_by_batch_before_the_mean(kind: partial, batches: int, budget: int) -> None:
    model = conftest.build_model("llama")
    inject(model, kind, PATTERN)
    layers, found = selectable_layers(model), {}
    uneven = [0.5, 0.25, 0.25][:batches] if batches > 1 else None  # shares of the means of gradients
    ScoringPass(_loss(model), BATCHES[:batches], uneven, budget).squared_gradient(layers, found.__setitem__)
    parts = [_dense_gradients([ids]) for ids in BATCHES[:batches]]
    for name in layers:
        wanted = sum(part[name].double() ** 2 for part in parts) / batches
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-3, atol=1e-10)


def test_a_gradient_is_averaged_over_ranks_before_it_is_squared() -> None:
    """Here the average over ranks halves, as if the other rank had nothing."""
    model = conftest.build_model("llama")
    inject(model, KINDS[0], PATTERN)
    layers, found = selectable_layers(model), {}
    # What ranks tell each other of the layers that they reach is a vector.
    halves = ScoringPass(_loss(model), BATCHES[:1], reduce=lambda one: one / 2 if one.ndim == 2 else one)
    halves.squared_gradient(layers, found.__setitem__)
    wanted = _dense_gradients(BATCHES[:1])
    for name in layers:
        torch.testing.assert_close(found[name], wanted[name] ** 2 / 4, rtol=1e-3, atol=1e-10)


def _rows() -> list[Example]:
    """Four rows whose answers have one to nine tokens."""
    lengths = [(7, 1), (3, 9), (5, 2), (9, 5)]
    ids = [torch.arange(prompt + answer) * 7 % 90 + 3 + 2 * row for row, (prompt, answer) in enumerate(lengths)]
    return [Example("t", "", "", Tokens(i, prompt)) for i, (prompt, _) in zip(ids, lengths, strict=True)]


@pytest.mark.parametrize("size", [1, 2])
def test_the_mean_gradient_does_not_depend_on_how_rows_are_cut_into_batches(size: int, tiny, tmp_path) -> None:
    """The gradient of the mean over all target tokens, taken here row by row without padding."""
    batches = [Collator(0)(_rows()[start : start + size]) for start in range(0, 4, size)]
    module = runs.module(tiny("gpt2"), KINDS[0], modules=conftest.TARGETS["gpt2"], dtype="float64")
    module.configure_model()
    module.trainer = runs.trainer(tmp_path)
    module.trainer.datamodule = SimpleNamespace(train_dataloader=lambda: batches)
    layers, found = selectable_layers(module.model), {}
    MaskSchedule(batches=9).scoring(module.trainer, module, 0).gradient(layers, found.__setitem__)

    dense = runs.module(tiny("gpt2"), None, dtype="float64")
    dense.configure_model()
    weights = {name: dense.model.get_parameter(name).requires_grad_(True) for name in layers}
    total = count = 0
    for row in _rows():
        ids, prompt = row.tokens.ids, row.tokens.prompt
        logits = dense.model(input_ids=ids[None]).logits[0, prompt - 1 : -1]
        total = total + F.cross_entropy(logits, ids[prompt:], reduction="sum")
        count += len(ids) - prompt
    assert count == 17
    wanted = torch.autograd.grad(total / count, list(weights.values()))
    for name, gradient in zip(weights, wanted, strict=True):
        torch.testing.assert_close(found[name], gradient.T, rtol=1e-9, atol=1e-14)
