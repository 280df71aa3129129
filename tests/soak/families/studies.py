"""Run studies: their pieces are fits by hand, and neither order, interruptions nor changes leave anything stale."""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from testbed.here import Here

from modular_experts import FullExpert, LoRAExpert, MaskSchedule, SparseExpert, TaskMixture, TrainUnderOthers, fit
from modular_experts.masks import RandomScore, SelectOnce
from modular_experts.merging.combine import combine
from modular_experts.study import read_study, results_of, run_study
from soak import bases
from soak.case import Case
from soak.experts import linear_weights, random_expert
from soak.fitting import same_bytes
from soak.reading import Reader
from soak.reference.files import read_expert
from soak.reference.model import Reference
from soak.scoring import near
from soak.tasks import TaskFile, random_row, random_task, write_task
from soak.validation import mean_loss

TIMES = ("seconds", "switch_seconds", "time")


class Interrupted(Exception):
    """Ends a study from outside."""


class World:
    """A base, tasks and other experts of one case, and the description of a study of them."""

    def __init__(self, case: Case) -> None:
        draw = case.random
        self.case = case
        self.kind = draw.choice(["llama", "chat", "bare", "qwen2", "gpt2"])
        self.base = case.folder / "base"
        shutil.copytree(bases.base_of(self.kind), self.base)
        self.tasks = [random_task(case, f"t{number}") for number in range(3)]
        self.others = case.folder / "others"
        self.draw_others()
        names = draw.sample(["lora", "sparse", "random", "full", "applied", "support", "under"], draw.choice([1, 2]))
        self.kinds = {name: self.settings(name) for name in names}
        merges = draw.sample(["SparseAverage", "TIES", "TaskArithmetic", "MagMax"], draw.choice([0, 1]))
        self.description: dict[str, Any] = {
            "base": str(self.base),
            "tasks": {"held_in": [str(task.path) for task in self.tasks[:2]], "held_out": [str(self.tasks[2].path)]},
            "experts": self.kinds,
            "merges": merges,
            "seeds": draw.sample(range(20), draw.choice([1, 2])),
            "matrix": case.chance(0.3),
            "max_new_tokens": 2,
            "data": draw.choice([{}, {"eval_limit": 2}, {"max_length": 24}]),
        }
        shown = {key: self.description[key] for key in ("experts", "merges", "seeds", "matrix", "data")}
        case.note(base=self.kind, **shown)

    def draw_others(self) -> None:
        """Write two experts, whose weights and supports trainings may use; again, they are others."""
        shutil.rmtree(self.others, ignore_errors=True)
        names = [name for name in linear_weights(self.kind) if name.split(".")[-2] in bases.LINEAR[self.kind][:2]]
        for number in range(2):
            place = self.others / f"e{number}"
            random_expert(self.case, self.kind, place, ["sparse"], names=names, tasks=[f"other{number}"])

    def settings(self, name: str) -> dict[str, Any]:
        """Return settings of a kind of expert, as a file has them."""
        draw = self.case.random
        sparse = {"class_path": "SparseExpert", "init_args": {"keep_ratio": 0.1}}
        own: dict[str, dict[str, Any]] = {
            "lora": {"expert": {"class_path": "LoRAExpert", "init_args": {"rank": 2, "dropout": 0.2}}},
            "full": {"expert": "FullExpert"},
            "sparse": {"expert": sparse},
            "random": {"expert": sparse},
            "applied": {"expert": sparse, "model": {"applied": [str(self.others / "e0")]}},
            "support": {"expert": sparse},
            "under": {"expert": {"class_path": "LoRAExpert", "init_args": {"rank": 1}}},
        }
        callbacks: dict[str, list[dict[str, Any]]] = {
            "random": [{"class_path": "MaskSchedule", "init_args": {"score": "RandomScore", "rule": "SelectOnce"}}],
            "support": [{"class_path": "MaskSchedule", "init_args": {"support": str(self.others / "e0")}}],
            "under": [{"class_path": "TrainUnderOthers", "init_args": {"others": [str(self.others)], "count": 1}}],
        }
        trainer = {"trainer": {"callbacks": callbacks[name]}} if name in callbacks else {}
        length = {"steps": draw.randint(2, 3), "batch_size": draw.choice([2, 4]), "learning_rate": 0.01}
        return {**own[name], **trainer, "modules": bases.LINEAR[self.kind][:2], **length}

    def by_hand(self, name: str, task: TaskFile, seed: int, out: Path) -> None:
        """Fit as a piece of the study does, with objects in the place of settings."""
        made: dict[str, tuple[Any, list[Callback]]] = {
            "lora": (partial(LoRAExpert, rank=2, dropout=0.2), []),
            "full": (FullExpert, []),
            "under": (partial(LoRAExpert, rank=1), [TrainUnderOthers([str(self.others)], count=1)]),
            "random": (partial(SparseExpert, keep_ratio=0.1), [MaskSchedule(RandomScore(), SelectOnce())]),
            "support": (partial(SparseExpert, keep_ratio=0.1), [MaskSchedule(support=str(self.others / "e0"))]),
        }
        expert, callbacks = made.get(name, (partial(SparseExpert, keep_ratio=0.1), []))
        settings = {key: self.kinds[name][key] for key in ("steps", "batch_size", "learning_rate")}
        quiet = {"logger": False, "enable_checkpointing": False, "default_root_dir": str(out.parent / "runs")}
        data = dict(self.description["data"])
        model = {"applied": [str(self.others / "e0")]} if name == "applied" else {}
        trainer = {**quiet, "callbacks": callbacks}
        modules = self.kinds[name]["modules"]
        places = str(self.base), str(task.path)
        fit(*places, expert, modules, str(out), seed=seed, data=data, model=model, trainer=trainer, **settings)

    def run(self, out: Path, stop: int | None = None, **changes: Any) -> dict[tuple[Any, ...], Any]:
        """Run the study, perhaps until some pieces are done, and return its numbers."""
        study = read_study(**{**self.description, **changes})
        done = 0

        def count(*_: Any) -> None:
            nonlocal done
            done += 1
            if stop is not None and done > stop:
                raise Interrupted

        state = run_study(study, out, executor=Here(), progress=count)
        for failure in state.failed.values():
            raise ValueError(failure.sentence)
        return numbers_of(results_of(study, state).rows)


def numbers_of(rows: Any) -> dict[tuple[Any, ...], Any]:
    """Return values by all else that tells rows apart, without times."""
    numbers = {}
    for row in rows:
        if row["metric"] not in TIMES:
            names = ("model", "task", "role", "metric", "kind", "merge", "count", "group", "seed")
            numbers[tuple(row.get(name) for name in names)] = row["value"]
    return numbers


def same_numbers(case: Case, first: Mapping[Any, Any], second: Mapping[Any, Any], text: str) -> None:
    """Check that two studies found the same numbers."""
    unlike = sorted(first.keys() ^ second.keys(), key=str)
    case.need(not unlike, f"{text}: only one has {unlike[:3]}")
    differ = [key for key in first if first[key] != second[key]]
    shown = [(key, first[key], second[key]) for key in differ[:3]]
    case.need(not differ, f"{text}: {len(differ)} of {len(first)} numbers differ: {shown}")


def studies(case: Case) -> None:
    """Run a study, fit one of its pieces by hand, and run it in another order with an interruption."""
    draw = case.random
    world = World(case)
    first = case.folder / "first"
    numbers = world.run(first)
    name, seed = draw.choice(list(world.kinds)), draw.choice(world.description["seeds"])
    task = draw.choice(world.tasks[:2])
    hand = case.folder / "hand" / "expert"
    world.by_hand(name, task, seed, hand)
    several = len(world.description["seeds"]) > 1
    stored = first / "library" / (f"{name}-{task.name}-seed{seed}" if several else f"{name}-{task.name}")
    same_bytes(case, stored, hand, f"{name} of {task.name} with seed {seed}, in the study and by hand")
    second = case.folder / "second"
    orders = {
        "seeds": world.description["seeds"][::-1],
        "experts": dict(reversed(world.kinds.items())),
    }
    stop = draw.randint(1, 6)
    case.note(stop=stop)
    with suppress(Interrupted):
        world.run(second, stop, **orders)
    same_numbers(case, numbers, world.run(second, **orders), "another order, interrupted")
    same_numbers(case, numbers, world.run(first), "the same study again")


def stale(case: Case) -> None:
    """Run a study, change a file that it names, and run it again, which gives the numbers of a fresh folder."""
    draw = case.random
    world = World(case)
    before = world.run(case.folder / "first")
    change = draw.choice(["training row", "test row", "held-out row", "others", "others", "tokenizer", "base"])
    case.note(change=change)
    if change in ("training row", "test row", "held-out row"):
        task = world.tasks[2 if change == "held-out row" else 0]
        split = "train" if change == "training row" else "test"
        rows = [row for row in task.rows if row is not task.split(split)[0]]
        write_task(case.folder, task.name, [*rows, random_row(case, split)])
    elif change == "others":
        world.draw_others()
    elif change == "tokenizer":
        file = world.base / "tokenizer.json"
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('"a": 69', '"a": 70', 1).replace('"b": 70', '"b": 69', 1), encoding="utf-8")
    else:
        file = world.base / "config.json"
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("1e-06", "0.3").replace("1e-05", "0.3"), encoding="utf-8")
    again = world.run(case.folder / "first")
    case.note(moved=before != again)
    same_numbers(case, world.run(case.folder / "fresh"), again, f"after a change: {change}")


def combined(case: Case) -> None:
    """Combine experts in all ways, and compare the losses of merges with the reference."""
    draw = case.random
    kind = draw.choice(["llama", "qwen2", "gpt2", "bare"])
    base = bases.base_of(kind)
    tasks = [random_task(case, f"t{number}") for number in range(2)]
    places = [case.folder / "library" / f"e{number}" for number in range(2)]
    forms = draw.choice([["low"], ["sparse"], ["dense"]])
    for number, place in enumerate(places):
        random_expert(case, kind, place, forms, names=draw.sample(linear_weights(kind), 2), tasks=[f"t{number}"])
    case.note(base=kind, forms=forms)
    mixture = TaskMixture([str(task.path) for task in tasks])
    out = case.folder / "combined"
    found = combine([str(place) for place in places], out, mixture)
    reader = Reader(base, bases.CONTEXT)
    merged = [way for way in found.ways if (Path(way.place) / "delta.safetensors").exists()]
    case.need(bool(merged), "no way is a merge")
    for way in merged:
        deltas = {name: delta.values for name, delta in read_expert(Path(way.place)).items()}
        reference = Reference(base, bases.CONTEXT, deltas)
        texts = [[reader.texts(row)[0] for row in task.split("validation")] for task in tasks]
        losses = [mean_loss(reference.loss, own) for own in texts]
        near(case, way.loss, sum(losses) / len(losses), f"{way.name}: loss", 3e-4)
    before = [(way.name, way.kept, way.loss, way.bytes) for way in found.ways]
    after = combine([str(place) for place in places], out, mixture)
    again = [(way.name, way.kept, way.loss, way.bytes) for way in after.ways]
    case.need(before == again, f"the same call again: {before}, {again}")


FAMILIES = {"studies": studies, "stale": stale, "combine": combined}
