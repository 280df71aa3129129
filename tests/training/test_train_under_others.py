"""TrainUnderOthers: what each step is computed with, that nothing of it stays, and what is refused."""

from functools import partial

import pytest
import torch
from conftest import write_rows
from lightning.pytorch import Callback
from testbed import runs

from modular_experts.base import Base
from modular_experts.experts import FullExpert, LoRAExpert, SparseExpert
from modular_experts.injection import eject, expert_layers
from modular_experts.library import open_expert
from modular_experts.masks import GrowAndDrop, SelectOnce
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.learning_rate import Constant
from modular_experts.training.preferences import DPO
from modular_experts.training.train_under_others import TrainUnderOthers

SPARSE = partial(SparseExpert, keep_ratio=0.1)
BLOCK = partial(SparseExpert, keep_ratio=0.3, granularity="block", block_size=8)
LORA = partial(LoRAExpert, rank=2)
ONCE = partial(MaskSchedule, rule=SelectOnce(), batches=1)


@pytest.fixture(scope="module")
def library(tmp_path_factory, one_block, task_files):
    """Two sparse experts and a LoRA of one task."""
    folder = tmp_path_factory.mktemp("others")
    for name, expert in {"a": SPARSE, "b": BLOCK, "c": LORA}.items():
        export = ExportExpert(str(folder / "library"), name, monitor=None)
        own, files = {"optimizer": partial(torch.optim.AdamW, lr=5e-2)}, {"upper": task_files["upper"]}
        runs.fit(one_block, files, folder, expert, export, ONCE(), own=own, max_steps=2, limit_val_batches=0)
    return folder / "library"


class Weights(Callback):
    """Keeps, of each step, the weights that the loss is computed with, and the expert's deltas then."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict, dict]] = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        # Called after the forward pass, before backward and the optimizer's step.
        layers = dict(expert_layers(pl_module.model))
        weights = {name: layer.weight.detach().double().clone() for name, layer in layers.items()}
        deltas = {name: delta.dense().double().clone() for name, delta in pl_module.task_vector()}
        self.steps.append((weights, deltas))


@pytest.fixture
def fit_reverse(one_block, task_files, tmp_path):
    """Train an expert of a task that the library does not have, and return its module."""

    def fit(expert, *callbacks, base=one_block, module=None, file=task_files["reverse"], **settings):
        how = {"own": module, "data": {"seed": 0}, "limit_val_batches": 0} | settings
        return runs.fit(base, {"reverse": file}, tmp_path, expert, *callbacks, **how)[0]

    return fit


@pytest.mark.parametrize("expert", [SPARSE, BLOCK, LORA], ids=["entries", "tiles", "lora"])
def test_each_step_is_computed_with_the_base_the_expert_and_the_scaled_others(
    expert, library, one_block, fit_reverse
) -> None:
    watch, others = Weights(), TrainUnderOthers(str(library), count=2, scale=0.5, seed=0)
    fit_reverse(expert, others, *([] if expert is LORA else [ONCE()]), watch)
    base, deltas = Base.open(one_block), {name: open_expert(library / name) for name in "abc"}
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    drawn = set()
    for weights, mine in watch.steps:
        fitting = []
        for pair in pairs:
            expected = {
                name: base.weight(name).double()
                + (0 if expert is LORA else mine[name])
                + 0.5 * sum(deltas[other][name].dense().double() for other in pair)
                for name in weights
            }
            if all(torch.allclose(weights[name], expected[name], atol=1e-6) for name in weights):
                fitting.append(pair)
        assert len(fitting) == 1
        drawn |= set(fitting)
    assert len(watch.steps) == 6
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("expert", "first"), [(SPARSE, True), (BLOCK, False), (LORA, True)], ids=["entries", "tiles", "lora"]
)
def test_nothing_of_the_others_stays_in_the_base_or_in_the_export(
    expert, first, library, one_block, fit_reverse, tmp_path
) -> None:
    """Choices of other entries while the others are in the base change nothing of it."""
    others = TrainUnderOthers(str(library), count=2, scale=0.5, seed=0)
    schedule = MaskSchedule(rule=GrowAndDrop(every=2, until=0.9, replace=0.5), batches=1)
    schedules = [] if expert is LORA else [schedule]
    listed = [others, *schedules] if first else [*schedules, others]
    export = ExportExpert(str(tmp_path / "library"), "mine", monitor=None)
    module = fit_reverse(expert, *listed, export)
    base, stored = Base.open(one_block), open_expert(export.target)
    for name, layer in expert_layers(module.model):
        expected = base.weight(name)
        if expert is not LORA:
            expected = (expected.double() + stored[name].dense().double()).float()
        assert torch.equal(layer.weight, expected)
    eject(module.model)
    assert all(torch.equal(weight, base.weight(name)) for name, weight in module.model.named_parameters())
    assert stored.record["costs"]["others"] == 2


@pytest.mark.parametrize("expert", [SPARSE, LORA, FullExpert], ids=["entries", "lora", "full"])
def test_two_lists_of_others_leave_the_base_together(expert, library, one_block, fit_reverse) -> None:
    several = [TrainUnderOthers([str(library / name)], count=1, scale=scale) for name, scale in (("b", 0.5), ("c", 1))]
    base, settings = Base.open(one_block), {"optimizer": partial(torch.optim.SGD, lr=0.0)}
    module = fit_reverse(expert, *several, max_steps=2, module=settings)
    eject(module.model, lambda name: module.model.get_parameter(name).detach().clone())
    assert all(torch.equal(weight, base.weight(name)) for name, weight in module.model.named_parameters())


def test_weights_without_an_expert_are_moved_and_restored_in_bfloat16_too(library, one_block, fit_reverse) -> None:
    seen = []

    class Seen(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            seen.append(pl_module.model.get_parameter(name).clone())

    name = "model.layers.0.mlp.down_proj.weight"
    others = TrainUnderOthers([str(library / "a")], count=1, scale=0.5)
    settings = {"dtype": "bfloat16", "modules": "q_proj"}
    module = fit_reverse(SPARSE, others, ONCE(), Seen(), max_steps=2, module=settings)
    start = Base.open(one_block).weight(name).bfloat16()
    moved = (start.double() + 0.5 * open_expert(library / "a")[name].dense().double()).bfloat16()
    assert torch.equal(seen[0], moved)
    assert not torch.equal(moved, start)
    assert torch.equal(module.model.get_parameter(name), start)


def test_experts_of_the_trained_task_are_left_out(library, one_block, task_files, tmp_path) -> None:
    others, files = TrainUnderOthers(str(library), count=1), {"upper": task_files["upper"]}
    with pytest.raises(ValueError, match=r"count=1 others cannot be drawn from 0 experts .* without those of upper"):
        runs.fit(one_block, files, tmp_path, SPARSE, others)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_full_experts_step_from_their_own_weight_along_the_gradient_under_the_others(
    rate, library, one_block, fit_reverse
) -> None:
    """Against a plain model in float64; at a rate of zero, not one bit of the weight moves."""

    class Batches(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.batch = {key: batch[key] for key in (*keys, "position_ids") if key in batch}

    keys, watch = ("input_ids", "attention_mask", "labels"), Batches()
    others = TrainUnderOthers(str(library), scale=0.5)
    settings = {"optimizer": partial(torch.optim.SGD, lr=rate), "scheduler": Constant()}
    module = fit_reverse(FullExpert, others, watch, max_steps=1, module=settings)
    base = Base.open(one_block)
    plain = base.load("float64")
    with torch.no_grad():
        for other in (open_expert(library / name) for name in "abc"):
            for name, delta in other.items():
                plain.get_parameter(name).add_(0.5 * delta.dense().double())
    plain(**watch.batch).loss.backward()
    for name, layer in expert_layers(module.model):
        weight, gradient = base.weight(name), plain.get_parameter(name).grad
        if rate == 0:
            assert torch.equal(layer.weight, weight)
        else:
            assert torch.allclose(layer.weight.double(), weight.double() - rate * gradient, rtol=0, atol=1e-6)
            assert gradient.abs().max() > 1e-4


class Gain(LoRAExpert):
    """Multiplies the weight by a factor."""

    delta_of_base = True


def test_what_cannot_train_under_others_is_refused(library, fit_reverse, tiny, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the Gain at model\.layers\.0.* makes its delta of weights of the base"):
        fit_reverse(Gain, TrainUnderOthers(str(library)))
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [{"prompt": "a:", "chosen": "a", "rejected": "b", "split": "train"}] * 4
    )
    with pytest.raises(ValueError, match=r"proj\.weight is trained itself, so a loss of preferences would compare"):
        fit_reverse(FullExpert, TrainUnderOthers(str(library)), module={"loss": DPO()}, file=pairs)
    with pytest.raises(ValueError, match="was trained on another base"):
        fit_reverse(SPARSE, TrainUnderOthers(str(library)), base=tiny("qwen2"))
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        TrainUnderOthers(str(library), count=0)
