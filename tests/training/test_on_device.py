"""Work that a GPU does in another way equals the same work on a CPU.

`make gpu` runs these tests on a GPU; without one, they run on a CPU.
"""

import copy
from functools import partial

import pytest
import torch
from conftest import build_model
from testbed.random_deltas import random_delta
from torch import nn

from modular_experts.base.device import device
from modular_experts.experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import inject
from modular_experts.injection.routed import routed
from modular_experts.library import Library
from modular_experts.native.kernel_choice import make_kernel
from modular_experts.training.export_expert import ExportExpert

pytestmark = pytest.mark.gpu
KINDS = {
    "entries": partial(SparseExpert, keep_ratio=0.2),
    "tiles": partial(SparseExpert, keep_ratio=0.2, granularity="block", block_size=16),
    "rows": partial(SparseExpert, keep_ratio=0.2, granularity="row"),
    "columns": partial(SparseExpert, keep_ratio=0.2, granularity="column"),
    "masked": MaskedExpert,
    "LoRA": LoRAExpert,
    "full": FullExpert,
}
TOKENS = torch.arange(24).view(2, 12) % 7 + 3


def after_steps(model: nn.Module, place: torch.device, steps: int = 3, compiled: bool = False) -> torch.Tensor:
    """Return the logits of a model that has taken steps on a device."""
    model, tokens = model.to(place).train(), TOKENS.to(place)
    run = torch.compile(model) if compiled else model
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(steps):
        run(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(input_ids=tokens).logits.detach().float().cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_on_the_device_are_those_of_a_processor(kind) -> None:
    model = build_model("llama")
    torch.manual_seed(0)
    inject(model, KINDS[kind], r".*\.(q_proj|down_proj)")
    start = model(input_ids=TOKENS).logits.detach()
    here = after_steps(copy.deepcopy(model), torch.device("cpu"))
    assert not torch.allclose(start, here, atol=1e-4)
    torch.testing.assert_close(after_steps(model, device()), here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tile", [(1, 1), (16, 16), (1, 96), (64, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_gradients_are_the_dense_ones(tile, dtype) -> None:
    torch.manual_seed(0)
    x, grad = (torch.randn(50, size).to(device(), dtype) for size in (96, 64))
    units = torch.arange(0, 64 * 96 // (tile[0] * tile[1]), 2, dtype=torch.int32, device=device())
    wanted = make_kernel("dense", units.cpu(), (64, 96), tile, torch.float32)
    for name in ("auto", *(["triton"] if tile == (16, 16) and device().type == "cuda" else [])):
        kernel = make_kernel(name, units, (64, 96), tile, dtype)
        found = kernel.gradient(kernel.saved(x), grad)
        exact = wanted.gradient(x.cpu().float(), grad.cpu().float())
        bound = 1e-4 if dtype == torch.float32 and name == "auto" else 0.1
        torch.testing.assert_close(found.float().cpu(), exact, rtol=0.02, atol=bound)


@pytest.mark.parametrize("kind", ["entries", "LoRA"])
def test_autocast_trains_a_bfloat16_base_in_float32(kind, fitted) -> None:
    own = {"optimizer": None, "dtype": "bfloat16", "learning_rate": 0.05}
    how = {"accelerator": device().type, "precision": "bf16-mixed", "max_steps": 12}
    trained, _, losses = fitted(KINDS[kind], own=own, **how)
    assert sum(losses[-2:]) < sum(losses[:2])
    assert all(one.dtype == torch.float32 for one in trained.parameters() if one.requires_grad)


def test_rows_with_experts_of_their_own_are_each_alone(tiny_llama_dir, tmp_path) -> None:
    base = build_model("llama").to(device())
    name = "model.layers.0.self_attn.q_proj.weight"
    experts = [{name: random_delta(form, base.get_parameter(name).shape, 0)} for form in ("Sparse", "LowRank")]
    tokens = TOKENS.to(device())
    with torch.no_grad(), routed(base, experts, rows=[0, 1], check=False):
        both = base(input_ids=tokens).logits
    for row, expert in enumerate(experts):
        alone = copy.deepcopy(base)
        weight = alone.get_parameter(name)
        weight.data += expert[name].dense().to(weight)
        with torch.no_grad():
            torch.testing.assert_close(both[row], alone(input_ids=tokens).logits[row], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(device().type != "cuda", reason="a compiler of a processor is tested by check_expert")
@pytest.mark.parametrize("kind", ["entries", "LoRA"])
def test_a_compiled_model_takes_the_same_steps(kind) -> None:
    torch.manual_seed(0)
    model = build_model("llama")
    inject(model, KINDS[kind], r".*\.(q_proj|down_proj)")
    plain = after_steps(copy.deepcopy(model), device())
    torch.testing.assert_close(after_steps(model, device(), compiled=True), plain, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu_multi
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_trains(fit_tiny, tmp_path) -> None:
    found = []
    for devices in (1, 2):
        how = {"accelerator": "cuda", "devices": devices, "strategy": "ddp_spawn" if devices > 1 else "auto"}
        fit_tiny(KINDS["entries"], ExportExpert(str(tmp_path), f"of-{devices}"), **how)
        found.append({name: delta.dense() for name, delta in Library(tmp_path)[f"of-{devices}"].items()})
    for name, delta in found[0].items():
        torch.testing.assert_close(found[1][name], delta, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(device().type == "cpu", reason="a CPU has no other memory")
def test_inputs_of_blocks_on_the_cpu_train_the_same(fit_tiny) -> None:
    losses = []
    for offload in (False, True):
        own = {"optimizer": None, "gradient_checkpointing": True, "offload_activations": offload}
        losses.append(fit_tiny(LoRAExpert, own=own, max_steps=3, accelerator=device().type)[2])
    assert losses[0] == losses[1]
