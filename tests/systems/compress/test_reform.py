"""The corrected weight is the least-squares one, and corrected layers are nearer to the whole ones at every block."""

from __future__ import annotations

import conftest
import pytest
import torch
from cutting import model_of, some

from modular_experts.systems.compress.ranking import magnitudes, rank
from modular_experts.systems.compress.reform import BlockByBlock, reform, reformed, relative_error
from modular_experts.systems.compress.removable import Removable

TEXT = torch.randint(3, 90, (5, 40), generator=torch.Generator().manual_seed(3))


def problem(tokens: int = 30) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight `(7, 12)`, inputs whose columns depend on each other, and columns that stay."""
    numbers = torch.Generator().manual_seed(4)
    inputs = torch.randn(tokens, 12, dtype=torch.float64, generator=numbers)
    inputs = inputs @ torch.randn(12, 12, dtype=torch.float64, generator=numbers)
    return torch.randn(7, 12, dtype=torch.float64, generator=numbers), inputs, torch.tensor([0, 3, 4, 8, 11])


@pytest.mark.parametrize("tokens", [30, 3], ids=["enough text", "too little text"])
def test_it_is_the_least_squares_solution(tokens) -> None:
    weight, inputs, kept = problem(tokens)
    found, residual = reformed(weight, inputs.T @ inputs, kept, damping=0.1)
    part = inputs[:, kept]
    lam = 0.1 * part.square().sum(0).mean()
    rows = torch.cat([part, lam.sqrt() * torch.eye(5, dtype=torch.float64)])
    wanted = torch.cat([inputs @ weight.T, lam.sqrt() * weight[:, kept].T])
    torch.testing.assert_close(found, torch.linalg.lstsq(rows, wanted).solution.T, rtol=1e-9, atol=1e-9)
    assert residual < 1e-8


def test_without_damping_it_is_the_formula_of_the_paper() -> None:
    weight, inputs, kept = problem()
    part = inputs[:, kept]
    wanted = torch.linalg.inv(part.T @ part) @ part.T @ inputs @ weight.T
    torch.testing.assert_close(reformed(weight, inputs.T @ inputs, kept, damping=0)[0], wanted.T)


def test_errors_are_those_of_the_outputs() -> None:
    weight, inputs, kept = problem()
    part = torch.ones(7, 5, dtype=torch.float64)
    wanted = (inputs @ weight.T - inputs[:, kept] @ part.T).norm() / (inputs @ weight.T).norm()
    assert relative_error(weight, inputs.T @ inputs, kept, part) == pytest.approx(wanted.item())


def test_a_layer_that_loses_nothing_or_reads_nothing_stays() -> None:
    weight, inputs, kept = problem()
    assert torch.equal(reformed(weight, inputs.T @ inputs, torch.arange(12))[0], weight)
    assert torch.equal(reformed(weight, torch.zeros(12, 12), kept)[0], weight[:, kept])


@pytest.mark.parametrize("architecture", conftest.ARCHITECTURES)
@torch.no_grad()
def test_block_by_block_is_the_model(architecture) -> None:
    model = model_of(architecture)
    steps = BlockByBlock(Removable(model, architecture), model, TEXT)
    hidden = steps.embedded
    for place in range(4):
        hidden = steps.through(place, hidden)
    wanted = model(TEXT, output_hidden_states=True)
    norm = getattr(model.base_model, {"gpt2": "ln_f", "neox": "final_layer_norm"}.get(architecture, "norm"))
    torch.testing.assert_close(norm(torch.cat(hidden)), wanted.hidden_states[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", conftest.ARCHITECTURES)
def test_the_error_falls_at_every_layer(architecture) -> None:
    removable = Removable(model_of(architecture), architecture)
    kept = some(removable, 1, 20)
    small = removable.cut(kept)
    errors = reform(removable, kept, small, TEXT)
    assert len(errors) == 3 * len(removable.readers)
    for error in errors:
        assert 0 < error.after < error.before
        assert error.residual < 1e-8
    assert {name for name, _, _, _ in errors} <= {name for name, _ in small.named_modules()}


@torch.no_grad()
def test_the_inputs_are_those_that_corrected_blocks_make() -> None:
    removable = Removable(model_of("llama"), "llama")
    kept = some(removable, 1, 20)
    small = removable.cut(kept)
    error = {name: after for name, _, after, _ in reform(removable, kept, small, TEXT)}
    # Block 2 of the whole model gets what the corrected block 0 makes.
    block, corrected, inputs = removable.model.model.layers[2], small.model.layers[1], []
    states = small(TEXT, output_hidden_states=True).hidden_states[1]
    steps = BlockByBlock(removable, removable.model, TEXT)
    hook = block.mlp.down_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    steps.through(2, list(states.split(1)))
    hook.remove()
    rows = torch.cat(inputs).flatten(0, 1)
    whole = rows @ block.mlp.down_proj.weight.T
    gone = (whole - rows[:, kept.channels[2]] @ corrected.mlp.down_proj.weight.T).norm() / whole.norm()
    assert error["model.layers.1.mlp.down_proj"] == pytest.approx(gone.item(), rel=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@torch.no_grad()
def test_contributions_are_what_a_removal_changes_and_magnitudes_what_it_takes(architecture) -> None:
    model = model_of(architecture)
    removable = Removable(model, architecture)
    found = rank(removable, TEXT, damping=0)
    inputs: dict[str, list[torch.Tensor]] = {}
    block = removable.modules(model)[1]
    for kind in removable.readers:
        layer = removable.reader(block, kind)
        layer.register_forward_pre_hook(lambda _, given, kind=kind: inputs.setdefault(kind, []).append(given[0]))
    model(TEXT)
    for kind, unit in (("groups", 16), ("channels", 1)):
        if kind not in removable.readers:
            continue
        rows = torch.cat(inputs[kind]).flatten(0, 1)
        weight = removable.reader(block, kind).weight
        weight = weight if architecture == "gpt2" else weight.T
        for member in (0, 1):
            these = slice(member * unit, (member + 1) * unit)
            alone = rows[:, these] @ weight[these]
            assert found.contribution[kind][1][member].item() == pytest.approx(alone.square().sum().item(), rel=1e-9)
            others = [place for place in range(rows.shape[1]) if place // unit != member]
            best = torch.linalg.lstsq(rows[:, others], rows @ weight).solution
            least = (rows @ weight - rows[:, others] @ best).square().sum().item()
            assert found.compensated[kind][1][member].item() == pytest.approx(least, rel=1e-6)
    sizes = magnitudes(removable)["channels"][1]
    wanted = {
        "llama": lambda mlp: [mlp.gate_proj.weight[3], mlp.up_proj.weight[3], mlp.down_proj.weight[:, 3]],
        "phi3": lambda mlp: [mlp.gate_up_proj.weight[3], mlp.gate_up_proj.weight[51], mlp.down_proj.weight[:, 3]],
        "gpt2": lambda mlp: [mlp.c_fc.weight[:, 3], mlp.c_fc.bias[3], mlp.c_proj.weight[3]],
    }[architecture](block.mlp)
    assert sizes[3].item() == pytest.approx(sum(one.square().sum().item() for one in wanted))


# By architecture and kind: the layers of which a member takes entries, its first entry in each and how many they are,
# along rows (0) or columns (1) of the stored weight.
TAKEN = {
    ("llama", "groups"): [("q_proj", 0, 0, 16), ("k_proj", 0, 0, 8), ("v_proj", 0, 0, 8), ("o_proj", 1, 0, 16)],
    ("phi3", "groups"): [("qkv_proj", 0, 0, 16), ("qkv_proj", 0, 32, 8), ("qkv_proj", 0, 48, 8), ("o_proj", 1, 0, 16)],
    ("llama", "channels"): [("gate_proj", 0, 0, 1), ("up_proj", 0, 0, 1), ("down_proj", 1, 0, 1)],
    ("phi3", "channels"): [("gate_up_proj", 0, 0, 1), ("gate_up_proj", 0, 48, 1), ("down_proj", 1, 0, 1)],
    ("gpt2", "channels"): [("c_fc", 1, 0, 1), ("mlp.c_proj", 0, 0, 1)],
}


@pytest.mark.parametrize(("architecture", "kind"), TAKEN)
@torch.no_grad()
def test_the_score_of_the_paper_sums_what_each_entry_weighs(architecture, kind) -> None:
    model = model_of(architecture)
    removable = Removable(model, architecture)
    found = rank(removable, TEXT, damping=0).entrywise[kind][1]
    layers, inputs = dict(removable.modules(model)[1].named_modules()), {}
    for name, first in [
        (name, next(one for one in layers if one.endswith(name))) for name, *_ in TAKEN[architecture, kind]
    ]:
        layers[name] = layers[first]
        layers[first].register_forward_pre_hook(lambda _, given, name=name: inputs.setdefault(name, given[0]))
    model(TEXT)
    wanted = [0.0] * len(found)
    for name, dim, start, unit in TAKEN[architecture, kind]:
        x = inputs[name].flatten(0, 1).T
        spread = torch.linalg.inv(2 * x @ x.T).diagonal().tolist()
        transposed = architecture == "gpt2"
        for i, row in enumerate(layers[name].weight.tolist()):
            for j, entry in enumerate(row):
                member = ((j if dim else i) - start) // unit
                if 0 <= member < len(wanted):
                    wanted[member] += entry**2 / spread[i if transposed else j]
    assert found.tolist() == pytest.approx(wanted, rel=1e-8)
