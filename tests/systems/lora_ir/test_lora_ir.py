"""LoRA-IR against merged weights and one LoRA at a time; its router learns first, sees prompts only, and then rests."""

import logging

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed.padded_rows import ROWS, padded

from modular_experts.data.batch import Batch, Collator, Example, Tokens, repacked
from modular_experts.evaluation import batch_losses
from modular_experts.evaluation.drafts import packs_evaluation
from modular_experts.injection import expert_layers, inject, named_experts
from modular_experts.merging.statistics import name_of, prompt_statistics
from modular_experts.routing import TopK
from modular_experts.routing.gates import CurrentGates, Gates, reading
from modular_experts.systems.lora_ir import LoRAIR, LoRAIRExpert, TaskGate
from modular_experts.testing import check_expert

OWN = {"experts": LoRAIR(experts=2, rank=2)}
OTHERS = [[50, 51, 52], [61, 60, 59, 58], [70], [55, 66, 77, 60, 61]]


def gate_of(model: torch.nn.Module) -> TaskGate:
    return next(expert for _, expert in named_experts(model) if isinstance(expert, TaskGate))


def gates_of(model: torch.nn.Module) -> Gates:
    """Return the gates that the layers read in the last pass, which are the same objects for all of them."""
    (found,) = {id(layer.expert.gates): layer.expert.gates.gates for _, layer in expert_layers(model)}.values()
    return found


def taught(architecture: str = "llama", **settings: object) -> torch.nn.Module:
    """Return a model with random LoRAs, whose router tells tokens of `ROWS` from tokens of `OTHERS`."""
    model = build_model(architecture).double()
    inject(model, LoRAIR(**{"experts": 2, "rank": 3, "alpha": 6.0, "prompts": 24} | settings))
    made = torch.Generator().manual_seed(4)
    read = []
    for rows in (ROWS, OTHERS):
        own = torch.tensor([token for row in rows for token in row])
        ids = own[torch.randint(0, len(own), (24, 6), generator=made)]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
        read.append(vectors(model, batch))
    gate_of(model).router.learn([], read)
    with torch.no_grad():
        for _, layer in expert_layers(model):
            for parameter in layer.expert.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=made, dtype=torch.float64))
    return model


def vectors(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    depths = gate_of(model).router.depths
    found = prompt_statistics(model, [batch], True, depths)
    return torch.cat([found[name_of(depth)].values for depth in depths], 1)


@pytest.mark.parametrize(("architecture", "k"), [("llama", 1), ("gpt2", 2), ("neox", 2)])
def test_a_batch_is_each_row_with_its_own_merged_weights(architecture: str, k: int) -> None:
    model, rows = taught(architecture, k=k), [*ROWS, *OTHERS]
    with torch.no_grad():
        found, gates = model(**padded(rows, "right")).logits, gates_of(model).dense(2)
    assert set(gates.argmax(1).tolist()) == {0, 1}, "the test must send rows to different experts"
    for number, row in enumerate(rows):
        merged = build_model(architecture).double()
        for name, layer in expert_layers(model):
            up, down = layer.expert.up.detach(), layer.expert.down.detach()
            delta = sum(gates[number, e] * 2.0 * up[:, 3 * e : 3 * e + 3] @ down[3 * e : 3 * e + 3] for e in range(2))
            merged.get_parameter(name).data += delta.T if architecture == "gpt2" else delta
        with torch.no_grad():
            alone = merged(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(found[number, : len(row)], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2])
def test_the_loss_teaches_a_router_only_where_several_experts_share_a_prompt(k: int) -> None:
    model = taught(k=k)
    router = gate_of(model).router
    router.weight.requires_grad_()
    current = next(layer.expert.gates for _, layer in expert_layers(model))
    hidden = F.normalize(torch.randn(4, router.weight.shape[1]), dim=1)
    expert = next(layer.expert for _, layer in expert_layers(model))
    current.gates = router(hidden)
    columns = expert.down.shape[1]
    out = expert(torch.randn(4, 3, columns, dtype=torch.float64), torch.zeros(len(expert.up), columns).double(), None)
    out.square().sum().backward()
    assert bool(router.weight.grad.any()) == (k == 2), "with one expert its gate is 1, whatever the logits"


def test_the_router_is_not_trained_and_its_rate_lowers_no_other() -> None:
    model = taught()
    assert not list(gate_of(model).parameters())
    assert gate_of(model).learning_rate == LoRAIRExpert.learning_rate
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"up", "down"}


def test_training_shows_the_gate_the_prompt_and_never_the_answer() -> None:
    model = taught(k=2, depths=[0.0, 1.0])
    seen = []
    for answer in ([50, 51], [70, 77]):
        ids = torch.tensor([[7, 8, 9, *answer]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "task": ["a"]}
        batch["labels"][:, :3] = -100
        model.train()
        batch_losses(model, batch)
        seen.append(gates_of(model).weights)
    model(input_ids=torch.tensor([[7, 8, 9]]))
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[0], gates_of(model).weights, rtol=1e-6, atol=1e-7)


def test_a_fit_teaches_its_tasks_and_uses_no_name_of_a_task(fit_tiny, caplog) -> None:
    with caplog.at_level(logging.INFO, "modular_experts"):
        module, trainer, _ = fit_tiny(None, own=OWN, data={"seed": 0})
    assert (
        "the router learned 2 tasks, and sends 12 of 12 validation prompts to the expert of their task" in caplog.text
    )
    rows = trainer.datamodule.input_examples(["validation"])
    for number, task in enumerate(sorted(rows)):
        batch = Collator(pad_id=0)(rows[task])
        with reading(tasks=["another"] * len(rows[task])), torch.no_grad():
            module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        assert gates_of(module.model).ids.flatten().tolist() == [number] * len(rows[task])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_keeps_its_router_and_reads_no_prompt_again(fit_tiny, tmp_path, caplog) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    first, *_ = fit_tiny(None, saving, own=OWN, data={"seed": 0}, max_steps=2, enable_checkpointing=True)
    caplog.clear()
    with caplog.at_level(logging.INFO, "modular_experts"):
        again, *_ = fit_tiny(None, own=OWN, data={"seed": 0}, max_steps=3, ckpt=tmp_path / "step=2.ckpt")
    assert "the router" not in caplog.text
    assert torch.equal(gate_of(again.model).router.weight, gate_of(first.model).router.weight)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_of_a_pack_have_the_gates_of_their_prompts(architecture: str) -> None:
    model = taught(architecture).eval()
    rows = [Example("", "", "", Tokens(torch.tensor([*row, 40, 41]), len(row))) for row in [*ROWS, *OTHERS]]
    batch = Collator(pad_id=0)(rows)
    assert packs_evaluation(model)
    wanted = batch_losses(model, batch)[0]
    assert set(gates_of(model).dense(2).argmax(1).tolist()) == {0, 1}, "the test must send rows to different experts"
    torch.testing.assert_close(batch_losses(model, repacked(batch))[0], wanted, rtol=1e-9, atol=1e-9)


def test_the_loras_keep_the_contract_of_an_expert() -> None:
    gates = CurrentGates(TopK(2)(torch.tensor([[0.3, 1.0], [0.2, -0.5]])))
    check_expert(lambda weight: LoRAIRExpert(weight, gates, experts=2, rank=2), compile=False)
