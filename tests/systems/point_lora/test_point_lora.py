"""PointLoRA: which tokens stand in front, that no answer changes what comes before it, and what layers share."""

import pytest
import torch
from conftest import ARCHITECTURES, build_model, build_tokenizer
from testbed.padded_rows import ROWS, padded
from testbed.systems import filled
from torch import nn

from modular_experts.evaluation import batch_losses
from modular_experts.evaluation.generation import generate_tokens
from modular_experts.injection import expert_layers, extra_losses, inject, named_experts
from modular_experts.routing.gates import reading
from modular_experts.systems.point_lora import PointLoRA, PointLoRAExpert, TokenSelection
from modular_experts.testing import check_expert


def selection_of(model: nn.Module) -> TokenSelection:
    return next(expert for _, expert in named_experts(model) if isinstance(expert, TokenSelection))


def planned(architecture: str = "llama", spread: float = 0.3, **settings: object) -> nn.Module:
    """Return a model whose LoRAs, MLPs and scorer have random values."""
    model = build_model(architecture).double()
    inject(model, PointLoRA(**{"rank": 2, "tokens": 3, "hidden": 5} | settings))
    return filled(model, spread)


def scores(model: nn.Module, ids: list[int]) -> torch.Tensor:
    selection = selection_of(model)
    return torch.sigmoid(selection.scorer(selection.embedding(torch.tensor(ids)))).flatten()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_best_tokens_stand_in_front_in_their_order(architecture: str, side: str) -> None:
    model = planned(architecture)
    selection, batch = selection_of(model), padded(ROWS, side)
    mask = batch["attention_mask"]
    with torch.no_grad():
        found = model(**batch).logits
        assert found.shape[:2] == (4, 5)
        # Places that the caller gives move with the tokens.
        placed = model(**batch, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(placed[mask.bool()], found[mask.bool()], rtol=1e-9, atol=1e-9)
        # The same by hand: a model that selects nothing reads the tokens behind those of the other one.
        bare = planned(architecture)
        selection_of(bare).before = lambda args, kwargs: None
        for row, ids in enumerate(ROWS):
            p = scores(model, ids)
            best = p.topk(min(3, len(ids))).indices.sort().values
            embedded = selection.embedding(torch.tensor(ids))
            whole = torch.cat([embedded[best] * p[best, None], embedded])[None]
            alone = bare(inputs_embeds=whole).logits[0, len(best) :]
            own = slice(0, len(ids)) if side == "right" else slice(5 - len(ids), 5)
            torch.testing.assert_close(found[row, own], alone, rtol=1e-9, atol=1e-9)


def test_of_equal_scores_the_first_tokens_are_taken() -> None:
    model = planned(tokens=2)
    selection, seen = selection_of(model), []
    model.get_submodule("model.layers.0").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        selection.scorer[2].weight.zero_()
        model(torch.tensor([[9, 8, 7, 6]]))
    wanted = torch.sigmoid(selection.scorer[2].bias) * selection.embedding(torch.tensor([9, 8]))
    torch.testing.assert_close(seen[0][0, :2], wanted)


def test_no_answer_changes_a_logit_before_it() -> None:
    model, found = planned(), []
    for answer in ([50, 51, 52], [50, 77, 60]):
        with torch.no_grad(), reading(torch.tensor([[1, 1, 1, 1, 0, 0, 0]]).bool()):
            found.append(model(torch.tensor([[7, 30, 9, 41, *answer]])).logits[0])
    assert torch.equal(found[0][:5], found[1][:5])
    assert not torch.equal(found[0][5:], found[1][5:])


def test_training_selects_among_the_prompt_alone() -> None:
    model, taken = planned(tokens=2), []
    model.get_submodule("model.layers.0").register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0][:, :2]))
    for answer in ([50, 51], [70, 77]):
        ids = torch.tensor([[7, 8, 9, *answer]])
        labels = ids.where(torch.tensor([[0, 0, 0, 1, 1]]).bool(), -100)
        batch_losses(model.train(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    assert torch.equal(taken[0], taken[1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_with_a_cache_is_generation_without(architecture: str) -> None:
    model, batch = planned(architecture), padded(ROWS, "left")
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    with reading(batch["attention_mask"].bool()):
        cached, whole = (
            model.generate(**batch, **how, use_cache=use, return_dict_in_generate=True) for use in (True, False)
        )
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-9, atol=1e-9)


def test_a_cache_without_a_mask_is_read_on() -> None:
    model, ids = planned(), torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad(), reading(torch.tensor([[1, 1, 1, 0, 0]]).bool()):
        whole = model(ids, use_cache=False).logits
        kept = model(ids[:, :3], use_cache=True)
        rest = model(ids[:, 3:], cache=kept.cache).logits
    torch.testing.assert_close(torch.cat([kept.logits, rest], 1), whole, rtol=1e-9, atol=1e-9)


def test_layers_of_a_kind_share_one_mlp() -> None:
    model = planned(modules=["q_proj", "down_proj"])
    selection, layers = selection_of(model), dict(expert_layers(model))
    assert sorted(selection.mlps) == ["down_proj_32x48", "q_proj_32x32"]
    mlps = {id(layer.expert.mlp) for layer in layers.values()}
    assert len(layers) == 4
    assert mlps == set(map(id, selection.mlps.values()))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    loras = 2 * 2 * (32 + 32) + 2 * 2 * (48 + 32)
    shared = (5 * 33 + 32 * 6) + (5 * 49 + 32 * 6)
    assert trained == loras + shared + (16 * 33 + 17)
    x = torch.randn(3, 32, dtype=torch.float64)
    layer = layers["model.layers.1.self_attn.q_proj.weight"]
    first, last = selection.mlps["q_proj_32x32"][0], selection.mlps["q_proj_32x32"][2]
    inner = nn.functional.gelu(x @ first.weight.T + first.bias)
    lora = 8.0 * (x @ layer.expert.down.T) @ layer.expert.up.T
    wanted = x @ layer.weight.T + lora + inner @ last.weight.T + last.bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_positive_weight_drives_scores_apart_and_a_negative_one_together(sign: int) -> None:
    model = planned(entropy=sign * 1.0, spread=1.0).train()
    batch, prompt = padded(ROWS, "right"), torch.tensor([[1, 1, 0, 0, 0]] * 4).bool()
    with reading(prompt):
        model(**batch)
    (found,) = extra_losses(model).values()

    def entropy() -> torch.Tensor:
        p = torch.cat([scores(model, ids[:2]) for ids in ROWS])
        return -(p * p.log() + (1 - p) * (1 - p).log()).mean()

    before = entropy()
    torch.testing.assert_close(found, sign * before, rtol=1e-9, atol=1e-9)
    assert extra_losses(model) == {}, "a penalty is asked once after each forward pass"
    found.backward()
    with torch.no_grad():
        for parameter in selection_of(model).scorer.parameters():
            parameter -= 1e-3 * parameter.grad
    assert (entropy() - before).item() * sign < 0, "scores far from 0.5 have the smaller entropy"


def test_the_loss_teaches_the_scorer() -> None:
    model = planned(entropy=0.0).train()
    ids = torch.tensor([[7, 8, 9, 50]])
    labels = ids.where(ids == 50, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch_losses(model, batch)[0].sum().backward()
    assert all(parameter.grad.any() for parameter in selection_of(model).scorer.parameters())
    assert extra_losses(model) == {}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_generation_leaves_the_selected_tokens_room(architecture: str) -> None:
    model, tokenizer = planned(architecture), build_tokenizer()
    context = model.config.max_position_embeddings - 3

    def answers(length: int) -> list[list[int]]:
        ids = torch.tensor([9 + place % 30 for place in range(300)])[None, -length:]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
        return generate_tokens(model, tokenizer, batch, max_new_tokens=10)

    assert [len(answers(context - left)[0]) for left in (10, 4, 1, 0)] == [10, 4, 1, 1]
    assert answers(300) == answers(context - 1)


def test_the_lora_keeps_the_contract_of_an_expert() -> None:
    def with_mlp(weight: torch.Tensor) -> PointLoRAExpert:
        mlp = nn.Sequential(nn.Linear(weight.shape[1], 3), nn.GELU(), nn.Linear(3, weight.shape[0]))
        nn.init.zeros_(mlp[2].weight), nn.init.zeros_(mlp[2].bias)
        return PointLoRAExpert(weight, mlp.requires_grad_(False), rank=2)

    check_expert(with_mlp, compile=False)
