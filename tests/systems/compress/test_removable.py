"""A model that is cut computes what the whole one does without the parts, in every architecture."""

import copy

import conftest
import pytest
import torch
from cutting import GROUPED, model_of, some
from transformers import PreTrainedModel

from modular_experts.systems.compress.removable import Kept, Removable

READERS = {
    **dict.fromkeys(["llama", "qwen2", "qwen3", "phi3"], ("self_attn.o_proj", "mlp.down_proj")),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "neox": ("attention.dense", "mlp.dense_4h_to_h"),
}
IDS = torch.randint(3, 90, (3, 17), generator=torch.Generator().manual_seed(0))


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
