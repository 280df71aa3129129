"""A cut model computes what the whole one does without the parts; a corrected weight is the least-squares one."""

import copy

import conftest
import pytest
import torch
from transformers import PreTrainedModel

from modular_experts.systems.compress.candidates import rank
from modular_experts.systems.compress.reform import DAMPING, BlockByBlock, reform, reformed
from modular_experts.systems.compress.removable import Kept, Removable

GROUPED = ["llama", "qwen2", "qwen3", "phi3"]
IDS = torch.randint(3, 90, (3, 17), generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(3, 90, (5, 40), generator=torch.Generator().manual_seed(3))


def model_of(architecture: str, layers: int = 4, **changes: object) -> PreTrainedModel:
    """Return a random model in float64 whose biases and norms are random too."""
    kinds = {"layer_types": ["full_attention"] * layers} if architecture.startswith("qwen") else {}
    model = conftest.build_model(architecture, **{"num_hidden_layers": layers} | kinds | changes).double()
    numbers = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn(weight.shape, dtype=weight.dtype, generator=numbers)
    return model


def some(removable: Removable, groups: int, channels: int) -> Kept:
    """Return blocks 0, 2 and 3 with other groups and channels in each, not contiguous."""
    numbers = torch.Generator().manual_seed(2)
    kept: dict[str, dict[int, torch.Tensor]] = {"groups": {}, "channels": {}}
    for block in (0, 2, 3):
        kept["groups"][block] = torch.randperm(removable.groups, generator=numbers)[:groups].sort().values
        kept["channels"][block] = torch.randperm(removable.channels, generator=numbers)[:channels].sort().values
    return Kept((0, 2, 3), **kept)


READERS = {
    **dict.fromkeys(GROUPED, ("self_attn.o_proj", "mlp.down_proj")),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


def masked(model: PreTrainedModel, architecture: str, kept: Kept) -> PreTrainedModel:
    """Return a copy in which what does not stay adds nothing to the hidden states; a head has 8 entries, a group 16."""
    model = copy.deepcopy(model)
    base = model.base_model
    for number, block in enumerate(base.h if architecture == "gpt2" else base.layers):
        for name, kind, unit in zip(READERS[architecture], ("groups", "channels"), (16, 1), strict=True):
            layer = block.get_submodule(name)
            if number not in kept.blocks:
                layer.weight.data.zero_()
                if layer.bias is not None:
                    layer.bias.data.zero_()
            elif kind == "channels" or architecture in GROUPED:
                weight = layer.weight.data if architecture == "gpt2" else layer.weight.data.T
                stays = {int(one) for one in getattr(kept, kind)[number]}
                weight[[place for place in range(len(weight)) if place // unit not in stays]] = 0
    return model


def size_of(model: PreTrainedModel) -> int:
    return sum(weight.numel() for weight in {id(weight): weight for weight in model.parameters()}.values())


@pytest.mark.parametrize("architecture", conftest.ARCHITECTURES)
@torch.no_grad()
def test_a_cut_is_a_mask(architecture) -> None:
    model = model_of(architecture)
    removable = Removable(model, architecture)
    assert removable.groups == (2 if architecture in GROUPED else 1)
    kept = some(removable, 1, 19)
    small, wanted = removable.cut(kept), masked(model, architecture, kept)(IDS).logits
    assert (small(IDS).logits - wanted).abs().max() < 1e-9
    assert (model(IDS).logits - wanted).abs().max() > 1e-3
    assert size_of(small) == removable.count(3, 1, 19) < size_of(model) == removable.parameters


@pytest.mark.parametrize("architecture", conftest.ARCHITECTURES)
def test_parameters_follow_from_sizes(architecture) -> None:
    removable = Removable(model_of(architecture, tie_word_embeddings=True), architecture)
    for groups in range(1, removable.groups + 1):
        for channels in (1, removable.channels):
            assert size_of(removable.cut(some(removable, groups, channels))) == removable.count(3, groups, channels)


def test_the_widest_mlp_within_a_limit() -> None:
    removable = Removable(model_of("llama"), "llama")
    limit = removable.count(3, 2, 21) + 5
    assert removable.widest(3, 2, limit) == 21
    assert removable.widest(3, 2, limit, multiple=8) == 16
    assert removable.widest(3, 2, removable.count(3, 2, 0)) == 0
    assert removable.widest(4, 2, removable.parameters, multiple=32) == 48


def test_blocks_keep_their_kinds_of_attention(tmp_path) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = model_of("qwen3", layer_types=kinds, sliding_window=4, use_sliding_window=True)
    removable = Removable(model, "qwen3")
    kept = some(removable, 2, 48)
    small = removable.cut(kept)
    assert small.config.layer_types == [kinds[0], kinds[2], kinds[3]]
    with torch.no_grad():
        assert (small(IDS).logits - masked(model, "qwen3", kept)(IDS).logits).abs().max() < 1e-9


def problem(tokens: int = 30) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight `(7, 12)`, inputs whose columns depend on each other, and columns that stay."""
    numbers = torch.Generator().manual_seed(4)
    inputs = torch.randn(tokens, 12, dtype=torch.float64, generator=numbers)
    inputs = inputs @ torch.randn(12, 12, dtype=torch.float64, generator=numbers)
    return torch.randn(7, 12, dtype=torch.float64, generator=numbers), inputs, torch.tensor([0, 3, 4, 8, 11])


@pytest.mark.parametrize("tokens", [30, 3], ids=["enough text", "too little text"])
def test_it_is_the_least_squares_solution(tokens) -> None:
    weight, inputs, kept = problem(tokens)
    found = reformed(weight, inputs.T @ inputs, kept)
    part = inputs[:, kept]
    lam = DAMPING * part.square().sum(0).mean()
    rows = torch.cat([part, lam.sqrt() * torch.eye(5, dtype=torch.float64)])
    wanted = torch.cat([inputs @ weight.T, lam.sqrt() * weight[:, kept].T])
    torch.testing.assert_close(found, torch.linalg.lstsq(rows, wanted).solution.T, rtol=1e-9, atol=1e-9)


def test_a_layer_that_loses_nothing_or_reads_nothing_stays() -> None:
    weight, inputs, kept = problem()
    assert torch.equal(reformed(weight, inputs.T @ inputs, torch.arange(12)), weight)
    assert torch.equal(reformed(weight, torch.zeros(12, 12), kept), weight[:, kept])


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


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "phi3"])
@torch.no_grad()
def test_each_block_is_nearer_to_the_whole_one_after_the_correction(architecture) -> None:
    removable = Removable(model_of(architecture), architecture)
    kept = some(removable, 1, 20)
    small = removable.cut(kept)
    cut = removable.cut(kept)
    assert reform(removable, kept, small, TEXT) == 3 * len(removable.readers)
    # Block 0 gets the same inputs in all three models.
    whole, before, after = (BlockByBlock(removable, one, TEXT) for one in (removable.model, cut, small))
    wanted, cut_off, corrected = (torch.cat(one.through(0, whole.embedded)) for one in (whole, before, after))
    assert (corrected - wanted).norm() < (cut_off - wanted).norm()


@torch.no_grad()
def test_the_inputs_are_those_that_corrected_blocks_make() -> None:
    removable = Removable(model_of("llama"), "llama")
    kept = some(removable, 1, 20)
    small = removable.cut(kept)
    reform(removable, kept, small, TEXT)
    # Block 2 of the whole model gets what the corrected block 0 makes.
    block, corrected, inputs = removable.model.model.layers[2], small.model.layers[1], []
    states = small(TEXT, output_hidden_states=True).hidden_states[1]
    steps = BlockByBlock(removable, removable.model, TEXT)
    hook = block.mlp.down_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    steps.through(2, list(states.split(1)))
    hook.remove()
    rows = torch.cat(inputs).flatten(0, 1)
    wanted = reformed(block.mlp.down_proj.weight, rows.T @ rows, kept.channels[2])
    torch.testing.assert_close(corrected.mlp.down_proj.weight, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@torch.no_grad()
def test_contributions_are_what_a_removal_changes(architecture) -> None:
    model = model_of(architecture)
    removable = Removable(model, architecture)
    found = rank(removable, TEXT, damping=0)
    inputs: dict[str, list[torch.Tensor]] = {}
    block = removable.modules(model)[1]
    for kind in removable.readers:
        layer = block.get_submodule(removable.readers[kind])
        layer.register_forward_pre_hook(lambda _, given, kind=kind: inputs.setdefault(kind, []).append(given[0]))
    model(TEXT)
    for kind, unit in (("groups", 16), ("channels", 1)):
        if kind not in removable.readers:
            continue
        rows = torch.cat(inputs[kind]).flatten(0, 1)
        weight = block.get_submodule(removable.readers[kind]).weight
        weight = weight if architecture == "gpt2" else weight.T
        for member in (0, 1):
            these = slice(member * unit, (member + 1) * unit)
            alone = rows[:, these] @ weight[these]
            assert found.contribution[kind][1][member].item() == pytest.approx(alone.square().sum().item(), rel=1e-9)
            others = [place for place in range(rows.shape[1]) if place // unit != member]
            best = torch.linalg.lstsq(rows[:, others], rows @ weight).solution
            least = (rows @ weight - rows[:, others] @ best).square().sum().item()
            assert found.compensated[kind][1][member].item() == pytest.approx(least, rel=1e-6)


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
