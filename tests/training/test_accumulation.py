"""A step over several batches has the gradient of the mean over all its target tokens, in float64 arithmetic."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler
from testbed import runs
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from modular_experts.data import TaskMixture
from modular_experts.data.batch import Batch
from modular_experts.experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import expert_layers
from modular_experts.masks import GrowAndDrop, Reselect, SelectOnce
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.preferences import DPO

WEIGHT = "model.layers.0.mlp.down_proj.weight"


class Steps(Callback):
    """Keeps the batches, losses and logged losses of each optimizer step, and the gradients that the optimizer gets."""

    def __init__(self) -> None:
        self.batches: list[list[Batch]] = []
        self.losses, self.logged = list[list[float]](), list[list[float]]()
        self.gradients, self.values = list[dict[str, Tensor]](), dict[str, Tensor]()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if len(self.batches) == trainer.global_step:
            for found in (self.batches, self.losses, self.logged):
                found.append([])
        self.batches[-1].append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.values = {n: p.detach().clone() for n, p in pl_module.model.named_parameters() if p.grad is not None}
        self.gradients.append({n: pl_module.model.get_parameter(n).grad.clone() for n in self.values})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses[-1].append(outputs["loss"].item())
        self.logged[-1].append(float(trainer.callback_metrics["loss"]))


@pytest.fixture
def steps(tiny_llama_dir, tmp_path) -> Callable[..., Steps]:
    """Take the steps of an epoch over 11 rows of 3 or 41 target tokens, at a rate of 0; return what was seen."""
    texts = [(f"q{n}:", "ab" * (20 if n % 4 == 0 else 1), ["c", "dd"][: 1 + n % 2]) for n in range(11)]
    rows = [{"input": q, "target": a, "choices": [a, *others], "split": "train"} for q, a, others in texts]
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def take(size: int, parts: int, kind: Any = FullExpert, *callbacks: Callback, **settings: Any) -> Steps:
        seen, data = Steps(), TaskMixture(str(tmp_path / "uneven.jsonl"), str(tiny_llama_dir), batch_size=size, seed=0)
        data.packing = settings.pop("packing", False)
        limits = {name: settings.pop(name) for name in ("max_epochs", "limit_train_batches") if name in settings}
        still = {"optimizer": partial(torch.optim.SGD, lr=0.0), "dtype": "float64"}
        how = {"max_steps": -1, "max_epochs": 1, "accumulate_grad_batches": parts, "limit_val_batches": 0}
        trainer = runs.trainer(tmp_path, seen, *callbacks, **(how | limits))
        trainer.fit(runs.module(tiny_llama_dir, kind, **still, **settings), data)
        return seen

    return take


@pytest.fixture
def base(tiny_llama_dir) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64).eval()


def _rows(base: Any, batches: list[Batch]) -> list[Tensor]:
    """Return the losses of the target tokens of each row, which passes alone through the base."""
    found = []
    for batch in batches:
        ids, labels, rows = batch["input_ids"], batch["labels"], torch.arange(len(batch["task"]))
        owner = batch["row"] if "row" in batch else torch.where(batch["attention_mask"] == 1, rows[:, None], -1)
        for row in rows:
            logits, wanted = base(input_ids=ids[owner == row][None]).logits[0, :-1], labels[owner == row][1:]
            known = wanted != -100
            found.append(-logits.log_softmax(-1)[known].gather(1, wanted[known][:, None])[:, 0])
    return found


CASES: dict[str, tuple[int, int, dict[str, Any], list[int]]] = {
    "one batch": (8, 1, {}, [8, 3]),
    "full, and one of three": (2, 3, {"limit_train_batches": 4}, [6, 2]),
    "full, and two of four": (2, 4, {}, [8, 3]),
    "packed": (2, 4, {"packing": True}, [8, 3]),
    "single rows, fewer than a step": (1, 16, {}, [11]),
    "two batches in the second epoch": (6, 1, {"max_epochs": 2}, [6, 5, 11]),
}


@pytest.mark.filterwarnings("ignore:When using .Trainer.accumulate_grad_batches != 1")
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_target_tokens(case: str, steps, base) -> None:
    size, parts, how, sizes = CASES[case]
    callbacks = [GradientAccumulationScheduler({1: 2})] if "max_epochs" in how else []
    seen = steps(size, parts, FullExpert, *callbacks, **how)
    assert [sum(len(batch["task"]) for batch in batches) for batches in seen.batches] == sizes
    assert len({len(one) for batches in seen.batches for one in _rows(base, batches)}) == 2
    for number, (batches, found) in enumerate(zip(seen.batches, seen.gradients, strict=True)):
        wanted = torch.cat(_rows(base, batches)).mean()
        assert sum(seen.losses[number]) == pytest.approx(wanted.item(), rel=1e-12)
        means = [torch.cat(_rows(base, [batch])).mean().item() for batch in batches]
        assert seen.logged[number] == pytest.approx(means, rel=1e-12)
        (gradient,) = torch.autograd.grad(wanted, base.get_parameter(WEIGHT))
        torch.testing.assert_close(found[WEIGHT], gradient, rtol=1e-10, atol=1e-15)


class Pulled(LoRAExpert):
    """Pulls `down` to zero, which has no other gradient while `up` is zero."""

    def extra_loss(self) -> dict[str, Tensor]:
        return {"size": 0.5 * self.down.square().sum()}


def test_a_penalty_keeps_its_weight_in_a_step_of_fewer_batches(steps) -> None:
    seen = steps(2, 4, partial(Pulled, rank=2))
    first, rest = ({name: one for name, one in step.items() if name.endswith("down")} for step in seen.gradients)
    assert len(first) == 4
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, seen.values[name], rtol=1e-12, atol=0)
        torch.testing.assert_close(rest[name], gradient, rtol=1e-12, atol=0)


def test_a_preference_counts_by_its_pairs(steps, base) -> None:
    """At the start, where all margins are zero, a pair's gradient is half of its margin's."""
    seen = steps(2, 4, loss=DPO(0.2))
    for batches, found in zip(seen.batches, seen.gradients, strict=True):
        margins = []
        for batch in batches:
            choices, owners = batch["choices"], batch["choices"]["row"]
            alone = {name: choices[name] for name in ("input_ids", "attention_mask", "labels")}
            whole = [one.sum() for one in _rows(base, [alone | {"task": owners}])]
            for chosen, row in ((place, owners[place]) for place in choices["correct"].nonzero()[:, 0]):
                others = (owners == row) & ~choices["correct"]
                margins += [whole[other] - whole[chosen] for other in others.nonzero()[:, 0]]
        assert len(margins) in (4, 5, 11, 12)
        wanted = -0.5 * 0.2 * torch.stack(margins).mean()
        (gradient,) = torch.autograd.grad(wanted, base.get_parameter(WEIGHT))
        torch.testing.assert_close(found[WEIGHT], gradient, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("mib", [1024, 0])
def test_what_a_step_chooses_trains_by_the_mean_over_its_target_tokens(mib: int, steps, base) -> None:
    schedule = MaskSchedule(rule=SelectOnce(), batches="step", accumulator_mib=mib)
    chosen: dict[int, tuple[Tensor, Tensor]] = {}

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            layer = dict(expert_layers(pl_module.model))[WEIGHT]
            chosen[trainer.global_step] = layer.expert.support_units().clone(), layer.expert.values.grad.clone()

    seen = steps(2, 4, partial(SparseExpert, keep_ratio=0.1), schedule, Look())
    for number, batches in enumerate(seen.batches):
        (gradient,) = torch.autograd.grad(torch.cat(_rows(base, batches)).mean(), base.get_parameter(WEIGHT))
        units, found = chosen[number]
        torch.testing.assert_close(found, gradient.flatten()[units.long()], rtol=1e-6, atol=1e-9)
        if mib and number == 0:
            assert units.tolist() == gradient.flatten().abs().topk(len(units)).indices.sort().values.tolist()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_batches_of_ones_own_that_tell_of_no_step_count_alike(tiny_llama_dir, task_files, tmp_path) -> None:
    data = runs.mixture(task_files, tiny_llama_dir)
    data.setup("fit")
    batches: Any = list(data.train_dataloader())
    seen, how = Steps(), {"max_steps": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    module = runs.module(tiny_llama_dir, FullExpert)
    runs.trainer(tmp_path, seen, **how).fit(module, DataLoader(batches, batch_size=None))
    assert len(seen.losses[0]) == 2
    assert seen.losses[0] == pytest.approx([one / 2 for one in seen.logged[0]], rel=1e-6)


class SaveEverywhere(Checkpoint):
    """Keeps checkpoints within batches, as an exception there does, after them, and in validations.

    They are of the second batch, and of all that follow the first epoch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, trainer, place: str) -> None:
        if trainer.current_epoch or trainer.fit_loop.total_batch_idx == 1:
            trainer.save_checkpoint(self.folder / f"{place}={trainer.fit_loop.total_batch_idx}.ckpt")

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self._save(trainer, "within")

    def on_train_batch_end(self, trainer, pl_module, *args, **kwargs) -> None:
        self._save(trainer, "batch")

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, "validation")


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (partial(LoRAExpert, rank=2, dropout=0.3), {}),
        (partial(LoRAExpert, rank=2, dropout=0.3), {"accumulate_grad_batches": 3, "val_check_interval": 2}),
        # A choice at each step; the steps of an epoch have four batches and two.
        (partial(SparseExpert, keep_ratio=0.1), {"accumulate_grad_batches": 4}),
        (partial(MaskedExpert, keep_ratio=0.1), {"accumulate_grad_batches": 2, "limit_train_batches": 5}),
    ],
    ids=["whole steps", "dropout", "choices in steps", "choices by passes"],
)
def test_a_run_resumed_within_a_step_or_a_batch_repeats_it(kind, how, one_block, task_files, tmp_path) -> None:
    saved = tmp_path / "saved"

    def end(*callbacks: Callback, **more: Any) -> dict[str, Tensor]:
        rule = GrowAndDrop(every=1, until=1.0) if kind.func is SparseExpert else Reselect(every=1, until=1.0)
        settings = {"max_steps": -1, "max_epochs": 2, "data": {"seed": 0}} | how | more
        schedule = MaskSchedule(rule=rule, seed=0)
        module, *_ = runs.fit(one_block, task_files, tmp_path, kind, schedule, *callbacks, **settings)
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}

    whole, files = end(SaveEverywhere(saved), enable_checkpointing=True), sorted(saved.iterdir())
    assert len(files) >= 2 * how.get("limit_train_batches", 6) + 2
    for file in files:
        rest = end(ckpt=file, seed=99)
        assert whole.keys() == rest.keys()
        assert all(torch.equal(tensor, rest[name]) for name, tensor in whole.items()), file.stem
