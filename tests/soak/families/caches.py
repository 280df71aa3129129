"""Measure again after a change: the results that a folder keeps are like a fresh measurement."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from modular_experts import TaskMixture, apply, evaluate, export, route
from modular_experts.reports import Results
from modular_experts.routing import Constant
from soak import bases
from soak.case import Case
from soak.experts import linear_weights, random_expert
from soak.tasks import Row, random_row, write_task


class Changing:
    """A base, experts, an adapter, a checkpoint, a route, tasks and settings, each of which can be changed."""

    def __init__(self, case: Case, kind: str) -> None:
        self.case, self.kind = case, kind
        self.base, self.library = case.folder / "base", case.folder / "library"
        shutil.copytree(bases.base_of(kind), self.base)
        self.peft, self.checkpoint = case.folder / "peft", case.folder / "checkpoint"
        self.roles = ["held_in", "held_out"]
        self.templates: list[dict[str, str]] = [{}, {}]
        self.settings: dict[str, Any] = {"max_new_tokens": 4, "dtype": "float32", "metrics": None}
        self.data: dict[str, Any] = {"max_length": 1024, "eval_limit": None, "chat_template": False}
        for number in range(2):
            self.draw_expert(number, ["low"])
        self.rows: list[list[Row]] = []
        for number in range(2):
            rows = [random_row(case, "test") for _ in range(4)]
            for row in rows:
                row["choices"] = list(dict.fromkeys(["yes", "no", row["target"]]))
            self.rows.append(rows + [random_row(case, "train") for _ in range(3)])
            self.write(number)
        self.draw_route([0.5, 0.5])
        export(str(self.expert(0)), self.peft, "lora")
        apply(str(self.expert(1)), self.checkpoint)
        names = {"e0": self.expert(0), "route": self.library / "route", "peft": self.peft, "whole": self.checkpoint}
        self.models: dict[str, Any] = {name: str(place) for name, place in names.items()}
        self.models |= {"base": [], "sum": [str(self.expert(0)), str(self.expert(1))]}

    def expert(self, number: int) -> Path:
        return self.library / f"e{number}"

    def draw_expert(self, number: int, forms: list[str]) -> None:
        names = self.case.random.sample(linear_weights(self.kind), 2)
        shutil.rmtree(self.expert(number), ignore_errors=True)
        random_expert(self.case, self.kind, self.expert(number), forms, names=names, tasks=[f"t{number}"])

    def draw_route(self, weights: list[float]) -> None:
        places = [str(self.expert(number)) for number in range(2)]
        route(places, self.library / "route", Constant(weights), overwrite=True)

    def write(self, number: int) -> None:
        write_task(self.case.folder, f"t{number}", self.rows[number])

    def measure(self, out: Path | None = None) -> Results | str:
        """Return results, or the sentence that refuses them."""
        tasks = [
            {"path": str(self.case.folder / f"t{number}.jsonl"), "role": self.roles[number], **self.templates[number]}
            for number in range(2)
        ]
        try:
            mixture = TaskMixture(tasks, **self.data)
            return evaluate(str(self.base), self.models, mixture, out=out, overwrite=True, **self.settings)
        except ValueError as error:
            return str(error)

    def change(self) -> str:
        """Make one random change, and return its name."""
        draw = self.case.random
        name = draw.choice(list(CHANGES))
        CHANGES[name](self)
        return name


def _change_row(number: int, place: int, **columns: Any) -> Callable[[Changing], None]:
    def change(world: Changing) -> None:
        row = world.rows[number][place]
        for column, value in columns.items():
            row[column] = value(row) if callable(value) else value
        world.write(number)

    return change


def _add_row(world: Changing) -> None:
    world.rows[1].append({"input": "new", "target": "yes", "split": "test"})
    world.write(1)


def _reverse_rows(world: Changing) -> None:
    world.rows[0].reverse()
    world.write(0)


def _set(group: str, name: str, *values: Any) -> Callable[[Changing], None]:
    def change(world: Changing) -> None:
        getattr(world, group)[name] = world.case.random.choice(values)

    return change


def _new_expert(world: Changing) -> None:
    world.draw_expert(0, world.case.random.choice([["low"], ["dense"]]))
    # A route of an expert that is gone is refused.
    world.draw_route([0.5, 0.5])


def _edit_json(file: str, change: Callable[[Any], None]) -> Callable[[Changing], None]:
    def edit(world: Changing) -> None:
        path = world.base / file
        contents = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        change(contents)
        path.write_text(json.dumps(contents), encoding="utf-8")

    return edit


def _swap_letters(tokenizer: Any) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def _scale_adapter(world: Changing) -> None:
    file = world.peft / "adapter_model.safetensors"
    times = os.stat(file)
    save_file({name: 1.7 * tensor for name, tensor in load_file(file).items()}, file)
    if world.case.chance(0.5):
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _scale_weights(world: Changing) -> None:
    """Change a norm of the base, which its experts' records then no longer name, and make them anew."""
    file = world.checkpoint / "model.safetensors"
    times = os.stat(file)
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    save_file(tensors | {name: 1.3 * tensors[name]}, file, {"format": "pt"})
    if world.case.chance(0.5):
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _chat(world: Changing) -> None:
    world.data["chat_template"] = world.kind == "chat"


CHANGES: dict[str, Callable[[Changing], None]] = {
    "input": _change_row(0, 0, input=lambda row: row["input"] + "z"),
    "target": _change_row(0, 1, target="no", choices=["no", "yes"]),
    "space behind a target": _change_row(0, 1, target=lambda row: row["target"] + "  ", choices=[]),
    "choices": _change_row(1, 0, choices=lambda row: [row["target"], "qq"]),
    "split": _change_row(0, 2, split="train"),
    "another row": _add_row,
    "order of rows": _reverse_rows,
    "roles": lambda world: world.roles.reverse(),
    "template": lambda world: world.templates[0].update(template="{input}?"),
    "max_new_tokens": _set("settings", "max_new_tokens", 1, 2, 6, None),
    "dtype": _set("settings", "dtype", "bfloat16", "float64", "float32"),
    "metrics": _set("settings", "metrics", ["number"], ["x=/[a-z]/"], ["x=/[A-Z]/"], {"rougeL": "number"}, None),
    "max_length": _set("data", "max_length", 12, 20),
    "eval_limit": _set("data", "eval_limit", 1, 2),
    "chat template": _chat,
    "expert": _new_expert,
    "weights of a route": lambda world: world.draw_route([0.1, 1.5]),
    "epsilon of the base": _edit_json("config.json", lambda config: config.update(rms_norm_eps=0.5)),
    "generation settings": _edit_json("generation_config.json", lambda config: config.update(do_sample=True)),
    "tokenizer": _edit_json("tokenizer.json", _swap_letters),
    "adapter": _scale_adapter,
    "checkpoint": lambda world: apply(str(world.expert(0)), world.checkpoint, overwrite=True),
    "weights of a checkpoint": _scale_weights,
    "names of models": lambda world: world.models.update(e0=str(world.expert(1))),
}


def cache(case: Case) -> None:
    """Measure into a folder, change one or two things, and measure again with the folder and without."""
    kind = case.random.choice(["llama", "chat", "qwen2"])
    world = Changing(case, kind)
    out = case.folder / "out"
    first = world.measure(out)
    case.need(isinstance(first, Results), f"refused: {first}")
    changes: list[str] = []
    case.note(base=kind, changes=changes)
    for _ in range(2):
        changes.append(world.change())
        fresh, kept = world.measure(), world.measure(out)
        if isinstance(fresh, str) or isinstance(kept, str):
            case.need(fresh == kept, f"{changes}: {fresh}, with the folder {kept}")
            return
        for ours, theirs in zip(_numbers(kept), _numbers(fresh), strict=True):
            same = ours[:-1] == theirs[:-1] and abs(ours[-1] - theirs[-1]) < 1e-6
            case.need(same, f"stale after {changes}: {ours}, not {theirs}")
        case.need(kept.facts["examples"] == fresh.facts["examples"], f"stale examples after {changes}")


def _numbers(results: Results) -> list[tuple[Any, ...]]:
    columns = ("model", "task", "metric", "rows", "role", "value")
    return [tuple(row[column] for column in columns) for row in map(dict, results.rows)]


FAMILIES = {"cache": cache}
