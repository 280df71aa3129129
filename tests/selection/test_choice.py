"""Selection: whose support is taken, which seed decides, what is recorded, and what a resumed run goes on with."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from lightning.pytorch import Callback
from testbed import runs
from testbed.runs import Watch

from modular_experts.experts import MaskedExpert, SparseExpert
from modular_experts.library import open_expert
from modular_experts.masks import (
    SNIP,
    ConnectionSensitivity,
    FisherInformation,
    GradientMagnitude,
    GrowAndDrop,
    RandomScore,
    Score,
    SelectOnce,
    WeightMagnitude,
)
from modular_experts.selection.choice import selectable_layers
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.module import ExpertModule

SPARSE = partial(SparseExpert, keep_ratio=0.1)
MASKED = partial(MaskedExpert, keep_ratio=0.1)
UNITS = {
    "element": {"keep_ratio": 0.1},
    "block": {"keep_ratio": 0.3, "granularity": "block", "block_size": 5},  # it divides no side of a weight
    "row": {"keep_ratio": 0.2, "granularity": "row"},
    "column": {"keep_ratio": 0.2, "granularity": "column"},
}


def _entries(path: Path) -> dict[str, set[int]]:
    """Return the flat entries that a stored expert keeps, in the base's orientation."""
    stored = open_expert(path)
    return {name: set(stored[name].support().tolist()) for name in stored}


def _record(path: Path) -> dict[str, Any]:
    return json.loads((path / "expert.json").read_text())


def test_how_layers_are_grouped_for_scoring_does_not_show(fit_tiny) -> None:
    settings = {"rule": SelectOnce(), "batches": 4}
    first, second = Watch(**settings), Watch(**settings, accumulator_mib=0)
    losses, others = (fit_tiny(SPARSE, watch, max_steps=2)[2] for watch in (first, second))
    assert first.supports == second.supports
    assert losses == others
    assert (first.passes, second.passes) == (4, 4 * 4)


@pytest.fixture(scope="module")
def neighbours(tiny_llama_dir, task_files, tmp_path_factory) -> Path:
    """A library of experts that keep entries and tiles."""
    folder = tmp_path_factory.mktemp("neighbours")
    kinds = {"entries": SPARSE, "tiles": partial(SparseExpert, keep_ratio=0.3, granularity="block", block_size=8)}
    for name, kind in kinds.items():
        export = ExportExpert(str(folder / "library"), name, monitor=None)
        runs.fit(tiny_llama_dir, task_files, folder, kind, MaskSchedule(rule=SelectOnce()), export, max_steps=2)
    return folder / "library"


@pytest.fixture
def beside(fit_tiny, tmp_path) -> Callable[..., Path]:
    """Train an expert beside others, whose selection has the given settings, and return where it is stored."""

    def train(kind: Callable, steps: int = 4, **settings: Any) -> Path:
        export = ExportExpert(str(tmp_path / "out"), "mine", monitor=None)
        fit_tiny(kind, MaskSchedule(**settings), export, max_steps=steps)
        return export.target

    return train


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        ("entries", partial(SparseExpert, keep_ratio=0.3)),
        ("tiles", partial(SparseExpert, keep_ratio=0.9, granularity="block", block_size=8)),
        ("entries", partial(MaskedExpert, keep_ratio=0.3)),
        ("tiles", partial(MaskedExpert, keep_ratio=0.3, granularity="block", block_size=8)),
    ],
)
def test_a_support_is_shared_as_it_is(other: str, kind, neighbours, beside) -> None:
    place = beside(kind, support=str(neighbours / other))
    assert _entries(place) == _entries(neighbours / other)
    mine, theirs = open_expert(place), open_expert(neighbours / other)
    assert all(mine[name].dense().ne(0).any() for name in mine)
    assert all(not torch.equal(mine[name].dense(), theirs[name].dense()) for name in mine)
    costs = _record(place)["costs"]
    assert (costs["selections"], costs["selection_passes"]) == (0, 0)


SCORES = [
    GradientMagnitude(),
    SNIP(),
    ConnectionSensitivity("absolute"),
    FisherInformation(),
    WeightMagnitude(),
    WeightMagnitude(smallest=True),
    RandomScore(),
]


@pytest.mark.parametrize("units", ["element", "block"])
def test_the_same_seed_twice_gives_the_same_supports_whatever_the_score(units, tiny_llama_dir, task_files, tmp_path):
    def made(noise: int) -> ExpertModule:
        torch.manual_seed(noise)  # the module's first, random support
        module = runs.module(tiny_llama_dir, partial(SparseExpert, **UNITS[units]))
        module.configure_model()
        module.trainer = runs.trainer(tmp_path)
        module.trainer.datamodule = data
        return module

    def chosen(score: Score, seed: int, noise: int) -> dict[str, list[int]]:
        torch.manual_seed(noise)  # where the process's random numbers are
        module = modules[noise]
        schedule = MaskSchedule(score=score, seed=seed, batches=1)
        found = schedule.choose(module.trainer, module, selectable_layers(module.model), 0, (2, 2))
        return {name: kept.tolist() for name, kept in found.items()}

    data = runs.mixture(task_files, tiny_llama_dir)
    data.setup("fit")
    modules = {noise: made(noise) for noise in (1, 2)}
    for score in SCORES:
        first = chosen(score, 0, noise=1)
        assert first == chosen(score, 0, noise=2), score
        same = score.statistic == "none" and not isinstance(score, RandomScore)
        same = same or isinstance(score, ConnectionSensitivity)  # nothing has changed yet, so all scores are zero
        assert (first == chosen(score, 1, noise=1)) is same, score


@pytest.mark.parametrize("units", ["element", "row"])
def test_the_support_of_a_weight_stored_the_other_way_round_is_shared_alike(units: str, tiny, task_files, tmp_path):
    def train(name: str, **settings: Any) -> Path:
        export = ExportExpert(str(tmp_path / "library"), name, monitor=None)
        kind, schedule = partial(SparseExpert, **UNITS[units]), MaskSchedule(seed=0, **settings)
        how = {"own": {"modules": conftest.TARGETS["gpt2"]}, "data": {"seed": 0}, "max_steps": 2}
        runs.fit(tiny("gpt2"), task_files, tmp_path, kind, export, schedule, **how)
        return export.target

    first = train("first", rule=SelectOnce())
    assert open_expert(first)["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    assert _entries(train("shared", support=str(first))) == _entries(first)


@pytest.mark.parametrize(("score", "passes"), [(None, 2), (FisherInformation(), 2), (WeightMagnitude(), 0)])
def test_the_record_holds_what_training_and_selections_cost(score, passes: int, beside) -> None:
    place = beside(SPARSE, steps=5, rule=GrowAndDrop(every=2, until=1.0), score=score, batches=2)
    costs, kept = _record(place)["costs"], sum(map(len, _entries(place).values()))
    assert kept == 2 * (102 + 153)
    assert costs["optimizer_bytes"] == 8 * kept
    assert (costs["selections"], costs["selection_passes"]) == (3, 3 * passes)
    assert costs["selection_seconds"] > 0


def test_a_run_resumed_within_the_step_of_a_choice_makes_that_choice(fit_tiny, tmp_path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    class SaveInTheEnd(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            raise OSError("no space")

        def on_exception(self, trainer, pl_module, exception) -> None:
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    def run(*callbacks: Callback, **settings: Any) -> dict[str, list[int]]:
        watch = Watch(rule=SelectOnce(), score=lambda weight, gradient, delta: weight.abs())
        fit_tiny(SPARSE, watch, *callbacks, max_steps=1, accumulate_grad_batches=2, **settings)
        return watch.supports[-1]

    # A resumed run must not depend on its own first supports.
    chosen = run(Save())
    assert run(ckpt=tmp_path / "within.ckpt", seed=99) == chosen
    with pytest.raises(OSError, match="no space"):
        run(SaveInTheEnd())
    assert run(ckpt=tmp_path / "failed.ckpt", seed=99) == chosen


@pytest.mark.parametrize(
    ("kind", "settings", "steps"),
    [
        (SPARSE, {}, 1),
        (SPARSE, {"rule": SelectOnce()}, 3),
        (SPARSE, {"batches": 2}, 1),
        (partial(SparseExpert, **UNITS["block"]), {}, 1),
        (MASKED, {}, 3),
        (partial(MaskedExpert, dense_start=False), {}, 3),
    ],
    ids=["default", "once", "passes", "tiles", "masked", "random-start"],
)
def test_a_second_fit_begins_with_all_that_the_first_trained(
    kind, settings, steps, tiny_llama_dir, task_files, tmp_path
) -> None:
    """With a rate of zero from there on, whatever changes was thrown away."""
    rate = 1e-2
    module = runs.module(tiny_llama_dir, kind, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate))
    schedule = MaskSchedule(**settings)
    data = runs.mixture(task_files, tiny_llama_dir)
    runs.trainer(tmp_path, schedule, max_steps=4).fit(module, data)
    trained = {name: delta.dense().clone() for name, delta in module.task_vector()}
    assert any(dense.any() for dense in trained.values())
    # `GrowAndDrop` exchanges entries at the second of few steps.
    rate = 0.0
    runs.trainer(tmp_path, schedule, max_steps=steps).fit(module, data)
    assert all(torch.equal(delta.dense(), trained[name]) for name, delta in module.task_vector())
