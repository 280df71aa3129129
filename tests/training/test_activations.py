"""A fit recomputes activations where it would else take more memory than there is, and trains the same."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from testbed.checkpointing import saved_for_backward
from testbed.runs import TARGET, Losses, mixture, module, trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from modular_experts import fit
from modular_experts.evaluation import batch_losses
from modular_experts.experts import FullExpert, LoRAExpert, SparseExpert
from modular_experts.training.activations import activations, held_bytes, high_water, recompute

KINDS = {"sparse": partial(SparseExpert, keep_ratio=0.1), "lora": LoRAExpert, "full": FullExpert}


@pytest.fixture(scope="session", params=["llama", "gemma2", "mixtral"])
def base(request, tiny):
    """A base with few tokens a row, one that keeps the square of their number, and a mixture of experts."""
    return tiny(request.param)


@pytest.mark.parametrize(("kind", "precision"), [("sparse", "32-true"), ("lora", "bf16-mixed"), ("full", "32-true")])
def test_a_pass_tells_what_blocks_keep_of_a_batch(kind, precision, base, task_files, tmp_path) -> None:
    found = module(base, KINDS[kind], modules="all-linear" if kind == "lora" else TARGET.replace("down", "k"))
    data, found.trainer = mixture(task_files, base, packing=False), trainer(tmp_path, precision=precision)
    data.setup("fit")
    found.configure_model()
    # Long rows, in which the square of the length counts.
    ids = torch.randint(5, 30, (3, 96), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "task": ["upper"] * 3}
    blocks = [one for one in found.model.train().modules() if isinstance(one, GradientCheckpointingLayer)]
    state = torch.get_rng_state()
    whole, less = activations(found, blocks, batch)
    assert torch.equal(torch.get_rng_state(), state)

    def saved() -> int:
        with found.trainer.precision_plugin.forward_context():
            return saved_for_backward(found.model, lambda: batch_losses(found.model, batch)[0].sum())[0]

    kept = saved()
    recompute(found.model)
    inputs = less - whole // len(blocks)
    assert inputs == len(blocks) * ids.numel() * 32 * 4
    assert kept - saved() == pytest.approx(whole - inputs, rel=0.05)


@pytest.fixture
def run(tiny_llama_dir, task_files, capsys):
    """Fit with some bytes and settings; return the losses, what is logged of memory, and whether blocks recomputed."""

    class Watch(Losses):
        def on_train_end(self, trainer, pl_module) -> None:
            self.recomputed = any(getattr(one, "gradient_checkpointing", False) for one in pl_module.model.modules())

    def run(fit_into, **model) -> tuple[list[float], str, bool]:
        seen = Watch()
        how = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "callbacks": [seen]}
        how = {"steps": 3, "batch_size": 12, "data": {"packing": False}, "trainer": how, "model": model}
        fit(str(tiny_llama_dir), [str(task_files["upper"])], LoRAExpert, TARGET, fit_into=fit_into, **how)
        lines = [line for line in capsys.readouterr().err.splitlines() if "checkpointing" in line]
        return seen.steps, "\n".join(lines), seen.recomputed

    return run


def test_a_fit_recomputes_where_that_makes_it_fit(run, monkeypatch) -> None:
    losses, *rest = run("1TB")
    assert rest == ["", False]
    # A process that takes nothing itself.
    monkeypatch.setattr("modular_experts.training.activations.held_bytes", lambda device: 0)
    same, text, recomputed = run(1)
    whole, there, less = re.findall(r"([\d.]+ k?B)\b", text)[:3]
    assert (same, recomputed, there) == (losses, False, "1 B")
    assert "also with gradient checkpointing" in text
    assert float(less.split()[0]) < 0.7 * float(whole.split()[0])
    half = f"{(float(less.split()[0]) + float(whole.split()[0])) / 2:.0f} kB"
    same, text, recomputed = run(half)
    assert (same, recomputed) == (losses, True)
    assert f"this fit takes about {whole} and {half} are there, so it uses gradient checkpointing" in text
    assert f"with which it takes {less} (" in text
    # The command's own process, in which other tests may have run before, names the option.
    assert re.search(r"\((`model.gradient_checkpointing=False`|--model.gradient_checkpointing False) leaves", text)
    # What a user sets stays.
    assert run(half, gradient_checkpointing=False) == (losses, "", False)
    assert run(half, gradient_checkpointing=True) == (losses, "", True)


def test_pages_of_files_are_not_held(tmp_path) -> None:
    device, size = torch.device("cpu"), 2**26
    before = held_bytes(device)
    held = torch.ones(size, dtype=torch.uint8)
    beside = held_bytes(device)
    held.numpy().tofile(tmp_path / "file")
    mapped = torch.from_file(str(tmp_path / "file"), size=size, dtype=torch.uint8)
    assert int(mapped.sum(dtype=torch.int64)) == size
    after = held_bytes(device)
    assert [(beside - before) / size, (after - beside) / size] == pytest.approx([1, 0], abs=0.1)


def test_the_inputs_of_blocks_alone_leave_the_device(tiny_llama_dir, monkeypatch) -> None:
    """NumPy stands for the CPU, and torch for a GPU."""
    moved: list[int] = []

    class ToNumPy(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool, device_type: str) -> None:
            super().__init__(self.leave, torch.from_numpy)

        def leave(self, tensor):
            moved.append(tensor.numel())
            return tensor.detach().numpy().copy()

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", ToNumPy)
    ids, gradients = torch.arange(48).view(3, 16) % 20 + 5, []
    for offload in (False, True):
        found = module(tiny_llama_dir, LoRAExpert, gradient_checkpointing=True, offload_activations=offload)
        torch.manual_seed(0)
        found.configure_model()
        model = found.model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([one.grad for one in model.parameters() if one.requires_grad])
    assert moved == 2 * [ids.numel() * 32]
    assert any(one.any() for one in gradients[0])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_nothing_leaves_a_cpu(tiny_llama_dir, task_files, tmp_path) -> None:
    found = module(tiny_llama_dir, LoRAExpert, offload_activations=True, gradient_checkpointing=None)
    with pytest.raises(ValueError, match="this fit computes on the CPU, where that does nothing; leave it out"):
        trainer(tmp_path).fit(found, mixture(task_files, tiny_llama_dir))
    assert not hasattr(found, "model")
    with pytest.raises(ValueError, match="leave one of the two out"):
        module(tiny_llama_dir, LoRAExpert, offload_activations=True, gradient_checkpointing=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells it")
def test_the_most_memory_of_a_process_leaves_out_the_one_that_started_it(monkeypatch) -> None:
    monkeypatch.delattr("resource.getrusage")  # which counts both
    before = high_water(torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # as if this process had just begun
    begun = high_water(torch.device("cpu"))
    held = torch.ones(2**27)
    assert begun <= before
    assert high_water(torch.device("cpu")) >= begun + 0.9 * held.nbytes
