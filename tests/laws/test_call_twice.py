"""The same call gives the same bytes whatever ran before it, and a seed matters where something is drawn, nowhere else.

The callbacks and searches of systems keep the same law in their own tests; `check_callback` holds callbacks to it that
draw nothing.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import write_rows
from lightning.pytorch import Callback
from testbed.laws import check_calls, without_seed
from testbed.random_deltas import write_random

import modular_experts.methods as methods
from modular_experts import distill, fit, generate, interference, merge, open_expert, route, search, shrink, tune
from modular_experts.data import TaskMixture
from modular_experts.data.epoch import Temperature
from modular_experts.experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.masks import RandomScore, Reselect, SelectOnce
from modular_experts.merging.gradient_search import ATLAS, AdaMerging
from modular_experts.routing import Arrow, Centroid, Classifier, Energy, KernelRidge, Oracle
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.gradient_mask import GradientMask
from modular_experts.training.train_under_others import TrainUnderOthers

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
NAMES = ("a", "b", "c")
WEIGHTS = {"model.layers.0.self_attn.q_proj.weight": (32, 32), "model.layers.0.mlp.down_proj.weight": (32, 48)}


@pytest.fixture(scope="module")
def place(one_block, tmp_path_factory) -> Path:
    """A library of three experts, a task of many rows, and tasks of one row in each split, whose order is the same."""
    folder = tmp_path_factory.mktemp("twice")
    for seed, name in enumerate(NAMES):
        write_random(folder / "library" / name, one_block, WEIGHTS, seed, [name])
        rows = [{"input": f"{name} 1", "target": "2", "split": split} for split in ("train", "validation", "test")]
        write_rows(folder / f"{name}.jsonl", rows)
    rows = [{"input": f"{number} + 1 =", "target": str(number + 1), "split": "train"} for number in range(12)]
    write_rows(folder / "many.jsonl", rows)
    return folder


AT_RANDOM = partial(MaskSchedule, score=RandomScore(), rule=SelectOnce())
# The expert, the callbacks, and whether something is drawn where an epoch is one row.
FITS: dict[str, tuple[Callable, Callable[[Path], list[Callback]], bool]] = {
    "full": (FullExpert, lambda place: [], False),
    "sparse": (partial(SparseExpert, keep_ratio=0.1), lambda place: [], False),
    "sparse at random": (partial(SparseExpert, keep_ratio=0.1), lambda place: [AT_RANDOM()], True),
    "masked at random": (
        partial(MaskedExpert, keep_ratio=0.1),
        lambda place: [MaskSchedule(score=RandomScore(), rule=Reselect(every=1))],
        True,
    ),
    "sparse by passes": (partial(SparseExpert, keep_ratio=0.1), lambda place: [MaskSchedule(batches=2)], False),
    "others": (SparseExpert, lambda place: [TrainUnderOthers(str(place / "library"), count=1)], True),
    "lora": (partial(LoRAExpert, rank=2), lambda place: [], True),
    "dropout": (partial(LoRAExpert, rank=2, dropout=0.3), lambda place: [], True),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit(name, place, one_block, tmp_path) -> None:
    expert, callbacks, matters = FITS[name]
    used = callbacks(place)
    # Under another name than the experts' tasks, because others are experts of other tasks.
    task = {"name": "one-row", "path": str(place / "a.jsonl")}
    data = TaskMixture(task)

    def call(seed: int, fresh: bool) -> str:
        mine = callbacks(place) if fresh else used
        tasks = TaskMixture(task) if fresh else data
        trainer = QUIET | {"limit_val_batches": 0, "callbacks": mine}
        settings = {"steps": 2, "seed": seed, "overwrite": True, "trainer": trainer}
        made = fit(one_block, tasks, expert, ["q_proj", "down_proj"], out=tmp_path / "x", **settings)
        return made.content_hash

    check_calls(call, matters)


@pytest.mark.parametrize("mixing", [None, Temperature(2.0)], ids=["proportional", "temperature"])
def test_the_order_of_rows(mixing, place, one_block, tmp_path) -> None:
    make = partial(TaskMixture, [str(place / "many.jsonl"), str(place / "a.jsonl")], batch_size=4, mixing=mixing)
    used = make()

    check_calls(lambda seed, fresh: call_with(make() if fresh else used, seed, one_block, tmp_path), True)
    with_seed = make(seed=5)
    hashes = {call_with(with_seed, seed, one_block, tmp_path) for seed in (1, 2)}
    assert len(hashes) == 1, "a mixture with a seed of its own does not follow the run's"


def call_with(data: TaskMixture, seed: int, base: Path, folder: Path) -> str:
    settings = {"steps": 3, "seed": seed, "overwrite": True, "trainer": QUIET | {"limit_val_batches": 0}}
    return fit(base, data, FullExpert, ["q_proj"], folder / "x", **settings).content_hash


FORMULAS = [kind for kind in methods.METHODS.values() if not (kind().needs.statistics or kind().needs.inputs)]


@pytest.mark.parametrize("kind", FORMULAS, ids=lambda kind: kind.__name__)
def test_a_merge(kind, place, tmp_path) -> None:
    experts = [place / "library" / name for name in NAMES[: 2 if kind is methods.SLERP else 3]]
    used = kind()

    def made(fresh: bool) -> str:
        method = kind() if fresh else used
        return merge(experts, method, tmp_path / "merged", overwrite=True).content_hash

    check_calls(without_seed(made), False)
    if "seed" in kind.__dataclass_fields__:
        check_calls(
            lambda seed, fresh: merge(experts, kind(seed=seed), tmp_path / "m", overwrite=True).content_hash, True
        )


ROUTERS = [Arrow, Centroid, Classifier, Energy, KernelRidge, Oracle]


@pytest.mark.parametrize("kind", ROUTERS, ids=lambda kind: kind.__name__)
def test_a_route(kind, place, tmp_path) -> None:
    experts = [place / "library" / name for name in NAMES]
    for name in NAMES:
        rows = [{"input": f"{name} {number}", "target": "2", "split": "train"} for number in range(6)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    files = [str(tmp_path / f"{name}.jsonl") for name in NAMES]
    used = kind()
    data = TaskMixture(files)

    def made(fresh: bool) -> str:
        router = kind() if fresh else used
        rows = TaskMixture(files) if fresh else data
        out = place / "library" / f"routed-{kind.__name__}"
        return route(experts, out, router, data=rows, overwrite=True).content_hash

    check_calls(without_seed(made), False)


@pytest.mark.parametrize("algorithm", [ATLAS(steps=2), AdaMerging(steps=2)], ids=lambda one: type(one).__name__)
def test_a_search(algorithm, place, tmp_path) -> None:
    experts = [place / "library" / name for name in NAMES]
    files = [str(place / f"{name}.jsonl") for name in NAMES]
    data = TaskMixture(files)

    def made(fresh: bool) -> str:
        rows = TaskMixture(files) if fresh else data
        return search(experts, algorithm, rows, tmp_path / "found", overwrite=True).expert.content_hash

    check_calls(without_seed(made), False)


def test_other_calls_that_measure_and_learn(place, tmp_path, one_block) -> None:
    experts = [place / "library" / name for name in NAMES]
    files = [str(place / f"{name}.jsonl") for name in NAMES]
    data = TaskMixture(files)
    tie = methods.TIES()

    def tuned(fresh: bool) -> object:
        rows = TaskMixture(files) if fresh else data
        return tune(experts, tie, rows, tmp_path / "tuned", {"keep": [0.1, 0.5]}, overwrite=True).expert.content_hash

    def distilled(fresh: bool) -> object:
        rows = TaskMixture(files) if fresh else data
        method = methods.Distilled(steps=2, max_new_tokens=2)
        return distill(experts, tmp_path / "distilled", method, rows, overwrite=True).expert.content_hash

    def shrunk(fresh: bool) -> object:
        rows = TaskMixture(files[:1]) if fresh else data.only(["a"])
        made = list(shrink(experts[:1], rows, tmp_path / "small", overwrite=True))
        return [one.expert and one.expert.content_hash for one in made]

    def compared(fresh: bool) -> object:
        return json.dumps(interference([open_expert(path) for path in experts]), default=str)

    def answered(fresh: bool) -> object:
        return generate(one_block, "1 + 1 =", [str(experts[0])], 3)

    for made in (tuned, distilled, shrunk, compared, answered):
        check_calls(without_seed(made), False)


def test_the_command_follows_its_seed(place, one_block, tmp_path, run, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = {"class_path": "MaskSchedule", "init_args": {"score": "RandomScore", "rule": "SelectOnce"}}
    words = ["--expert", "SparseExpert", "--modules", "q_proj", "--tasks", place / "a.jsonl", "--steps", 1]

    def call(seed: int, fresh: bool) -> str:
        more = ["--seed", seed, "--overwrite", "--trainer.callbacks", json.dumps([schedule]), "--out", "library/x"]
        code, _, err = run("fit", "--base", one_block, *words, *more)
        assert code == 0, err
        record = open_expert("library/x").record
        assert record["seed"] == seed
        return record["content_hash"]

    check_calls(call, True)


def test_a_mask_of_an_expert_is_read_when_a_fit_begins(place, one_block, tmp_path) -> None:
    shutil.copytree(place / "library" / "a", tmp_path / "mask")
    used = GradientMask(masks=str(tmp_path / "mask"))
    shutil.rmtree(tmp_path / "mask")
    shutil.copytree(place / "library" / "b", tmp_path / "mask")

    def trained(mask: GradientMask) -> str:
        settings = {"steps": 1, "overwrite": True, "trainer": QUIET | {"callbacks": [mask]}}
        data = TaskMixture(str(place / "a.jsonl"))
        return fit(one_block, data, FullExpert, ["q_proj", "down_proj"], tmp_path / "x", **settings).content_hash

    assert trained(used) == trained(GradientMask(masks=str(tmp_path / "mask")))
