"""What choosing an expert for each row keeps, beside the best merge: every router, with and without a fallback.

The experts are those of `merge_quality` and lie in the same place (`--work`); what is not there is trained. A router
learns from training and validation inputs of the experts' tasks, without answers. Shown are exact match and loss on
test rows, held in and held out, how much of the single experts' score that is, the share of held-in rows that went to
their own expert (of soft gates the largest), and the shares of rows that were rejected. Where each row has one expert,
rows of one expert are tested together, with the expert added to the base, which gives what a mixture gives
(`tests/routing`) in less time; soft gates and routers of tokens are tested as mixtures, row by row.

    python benchmarks/routing_quality.py [--kinds sparse ...] [--routers Classifier Arrow ...] [--seeds 0 1 2]
    python benchmarks/routing_quality.py --routers "the experts alone" Phatgoose
    python benchmarks/routing_quality.py --real .cache/smollm2 DATA [--stripped] [--tasks 4]
    python benchmarks/routing_quality.py --cost [--real .cache/smollm2 DATA]

`--routers` is every way but `Phatgoose`, for which it must be named: gates of all experts are trained first, once. Each
result is stored when it is there, so that an interrupted call goes on and a later one adds rows.

`--real` takes fifteen experts on real tasks, eleven of which ask with the same words. With `--stripped` the test
prompts lose their instruction ("Name the intent of the request."), and routers still learn from whole prompts.

`--cost` shows instead what each way costs: the CPU time of a pass over the same 32 test prompts with all experts in the
model, in turn with a pass of the base alone, as the ratio of the shortest of five rounds; and the bytes that experts,
fallback and routers hold, over those of the base. Gates come from 16 inputs a task, whose number changes no cost.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from intervals import interval
from merge_worlds import Experts, RealExperts, SuiteExperts
from torch import Tensor

from modular_experts.base.apply import applied
from modular_experts.data.batch import Collator, Example
from modular_experts.data.batch import prompts as prompts_of
from modular_experts.data.rows import spread_evenly
from modular_experts.data.tokenize import RowTokenizer
from modular_experts.evaluation import measure
from modular_experts.injection import expert_layers
from modular_experts.injection.routed import by_weight, routed
from modular_experts.jobs import JSONLines, LocalProcesses, Piece, print_progress, run
from modular_experts.library import open_expert, open_experts, open_statistics
from modular_experts.library.statistics import kinds_of_statistics
from modular_experts.merger.merged import Merged, write_merged
from modular_experts.methods import IsoC, SelfRegMean
from modular_experts.routing import (
    Arrow,
    Centroid,
    Classifier,
    Energy,
    GenKnowSub,
    Oracle,
    Phatgoose,
    Router,
    Softmax,
    TopK,
)
from modular_experts.routing.gates import reading
from modular_experts.routing.prompts import prompt_vectors
from modular_experts.statistics import take_statistics
from modular_experts.statistics.prompts import name_of, prompts

BATCH = 16
SCORES = ("exact_match", "loss")
TIMED, ROUNDS = 32, 5
"""Prompts that are timed, and how often, after a warm-up."""
TEMPERATURE = 10.0
"""Of soft gates by `Centroid`, whose own softmax is nearly always sure of one expert; a guess."""


@dataclass(frozen=True)
class Way:
    """A router, and whether a merge takes what it rejects; without a router the merge takes all rows.

    Attributes:
        inputs: The most inputs of a task that a router of prompts learns from.
        mixed: Whether a row may have several experts, so that it is tested with all of them in the model.
    """

    router: Callable[[], Router] | None
    fallback: bool = False
    inputs: int = 400
    mixed: bool = False


WAYS = {
    "the experts alone": Way(Oracle),
    "the best merge": Way(None, fallback=True),
    "Centroid": Way(lambda: Centroid(reject=None)),
    "Centroid, base as fallback": Way(Centroid),
    "Centroid, merge as fallback": Way(Centroid, fallback=True),
    "Centroid, merge as fallback, 64 inputs": Way(Centroid, fallback=True, inputs=64),
    "Centroid, merge as fallback, 16 inputs": Way(Centroid, fallback=True, inputs=16),
    "Centroid, two experts": Way(lambda: Centroid(reject=None, select=TopK(2, TEMPERATURE)), mixed=True),
    "Centroid, all experts": Way(lambda: Centroid(reject=None, select=Softmax(TEMPERATURE)), mixed=True),
    "Classifier": Way(lambda: Classifier(reject=None)),
    "Classifier, base as fallback": Way(Classifier),
    "Classifier, merge as fallback": Way(Classifier, fallback=True),
    "Classifier, two experts": Way(lambda: Classifier(reject=None, select=TopK(2)), mixed=True),
    "Classifier, all experts": Way(lambda: Classifier(reject=None, select=Softmax()), mixed=True),
    "Arrow": Way(Arrow, mixed=True),
    "GenKnowSub": Way(GenKnowSub, mixed=True),
    "Energy": Way(Energy, mixed=True),
    "Phatgoose": Way(Phatgoose, mixed=True),
}


def main() -> None:
    options = _options()
    work = Path(options.work)
    worlds = {seed: _world(options, seed) for seed in options.seeds}
    for seed, world in worlds.items():
        for kind in options.kinds:
            for task in world.tasks:
                if not world.expert(kind, task).exists():
                    print(f"training {kind} on {task}, seed {seed}", file=sys.stderr, flush=True)
                    world.train(kind, task)
            _fallback(world, kind)
            if "Phatgoose" in options.routers:
                _train_gates(world, kind)
    keys = [(seed, kind, name) for seed in worlds for kind in options.kinds for name in options.routers]
    if options.cost:
        # A merge is in the weights and costs what the base does.
        keys = [key for key in keys if WAYS[key[2]].router is not None]
        store = JSONLines(work / f"routing-costs{options.some}.jsonl")
        with LocalProcesses(1) as pool:
            pieces = [Piece(key, _cost, (worlds[key[0]], *key)) for key in keys]
            run(pieces, store, pool, print_progress()).raise_failures()
        _show_costs(keys, store, options)
        return
    store = JSONLines(work / f"routing{options.some}.jsonl")
    with LocalProcesses(options.processes) as pool:
        pieces = [Piece(key, _tested, (worlds[key[0]], *key, options.stripped)) for key in keys]
        run(pieces, store, pool, print_progress()).raise_failures()
    rows = [_row(kind, name, store, options) for kind in options.kinds for name in options.routers]
    if options.json:
        json.dump({"seeds": options.seeds, "rows": rows}, sys.stdout, indent=2)
    else:
        _print(rows, options.seeds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds, routers = list(Experts.kinds), [name for name in WAYS if name != "Phatgoose"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="kinds of experts: all")
    parser.add_argument("--routers", nargs="+", choices=WAYS, metavar="NAME", default=routers, help=", ".join(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 2, with real tasks 0")
    parser.add_argument("--work", help="where experts and results are kept: that of merge_quality")
    parser.add_argument(
        "--real", nargs=2, metavar=("BASE", "DATA"), help="a pretrained base and a folder of task files"
    )
    parser.add_argument("--stripped", action="store_true", help="with --real: test prompts without their instruction")
    parser.add_argument("--tasks", type=int, help="with --real: the first few tasks")
    parser.add_argument("--cost", action="store_true", help="show seconds and bytes instead, one way after the other")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once, each on one thread: all cores")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    options = parser.parse_args()
    options.seeds = options.seeds or ([0] if options.real else [0, 1, 2])
    options.some = (f"-{options.tasks}" if options.tasks else "") + ("-stripped" if options.stripped else "")
    options.work = options.work or ("runs/merge-quality-real" if options.real else "runs/merge-quality")
    if options.stripped and (options.cost or not options.real):
        parser.error("--stripped is for --real, without --cost")
    return options


def _world(options: argparse.Namespace, seed: int) -> Experts:
    if options.real:
        path, data = map(Path, options.real)
        return RealExperts(seed, Path(options.work), "bfloat16", path=path, data=data, count=options.tasks)
    return SuiteExperts(seed, Path(options.work))


def _fallback(world: Experts, kind: str) -> Path:
    """Return where the best merge without data lies, which is made if it is not there."""
    place = world.expert("routed", f"{kind}-fallback-of-{len(world.tasks)}")
    if not place.exists():
        method = IsoC(scale=2.0 if isinstance(world, RealExperts) else 1.0) if kind == "lora" else SelfRegMean()
        write_merged(Merged([open_expert(world.expert(kind, task)) for task in world.tasks], method), place)
    return place


def _train_gates(world: Experts, kind: str) -> None:
    """Train the gates of all experts that have none yet, each on its task's validation rows."""
    for task in world.tasks:
        place = world.expert(kind, task)
        if "gates" not in kinds_of_statistics(open_expert(place)):
            print(f"training gates of {kind} on {task}, seed {world.seed}", file=sys.stderr, flush=True)
            take_statistics([place], "gates", world.mixture([task]))


def _tested(world: Experts, seed: int, kind: str, name: str, stripped: bool) -> dict[str, Any]:
    """Test all rows behind a router, and count where it sends them."""
    logging.getLogger("modular_experts").setLevel(logging.ERROR)
    way, tasks = WAYS[name], world.tasks
    data = (_stripped(world) if stripped else world).mixture(tasks, held_out=True)
    data.setup("test")
    loader: Any = data.test_dataloader()
    examples: list[Example] = list(loader.dataset.examples)
    router = None if way.router is None else _learned(world, kind, way)
    numbers = None if isinstance(router, dict) else _numbers(world, router, examples)
    found: dict[str, Any] = {"piece": [seed, kind, name], "right": {}, "rejected": {}}
    for task in data.roles:
        # A router of tokens sends no row anywhere.
        mine = numbers and [number for number, one in zip(numbers, examples, strict=True) if one.task == task]
        found["rejected"][task] = mine and fmean(number == len(tasks) for number in mine)
        if task in tasks:
            found["right"][task] = mine and fmean(number == tasks.index(task) for number in mine)
    if way.mixed:
        experts = [open_expert(world.expert(kind, task)) for task in tasks]
        fallback = open_expert(_fallback(world, kind)) if way.fallback else None
        with routed(world.model, experts, router, fallback=fallback, check=False):
            scores = measure(world.model, world.tokenizer, _batches(world, examples), data.roles, world.new_tokens)
        return found | {score: {task: scores["tasks"][task][score] for task in data.roles} for score in SCORES}
    totals: dict[tuple[str, str], list[float]] = {}
    assert numbers is not None
    for number in sorted(set(numbers)):
        own = [one for chosen, one in zip(numbers, examples, strict=True) if chosen == number]
        place = world.expert(kind, tasks[number]) if number < len(tasks) else _fallback(world, kind)
        with applied(world.model, open_expert(place) if number < len(tasks) or way.fallback else [], check=False):
            scores = measure(world.model, world.tokenizer, _batches(world, own), data.roles, world.new_tokens)
        for task, facts in scores["tasks"].items():
            for score in SCORES:
                totals.setdefault((score, task), []).append(facts[score] * facts["rows"])
    rows = {task: sum(one.task == task for one in examples) for task in data.roles}
    return found | {score: {task: sum(totals[score, task]) / rows[task] for task in data.roles} for score in SCORES}


@torch.no_grad()
def _cost(world: Experts, seed: int, kind: str, name: str) -> dict[str, Any]:
    """Return CPU seconds of passes over some test prompts, and bytes, of the base alone and of all experts in it."""
    logging.getLogger("modular_experts").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    way, tasks = WAYS[name], world.tasks
    base: Any = world.model.eval()
    data = world.mixture(tasks, held_out=True)
    data.setup("test")
    loader: Any = data.test_dataloader()
    timed = _prompts(world, spread_evenly(loader.dataset.examples, TIMED))
    router = _learned(world, kind, replace(way, inputs=16))
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    experts = [open_expert(world.expert(kind, task)) for task in tasks]
    fallback = open_expert(_fallback(world, kind)) if way.fallback else None
    seconds: dict[int, list[float]] = {id(base): [], id(model): []}
    with routed(model, experts, router, fallback=fallback, check=False) as found:
        for _ in range(ROUNDS + 1):
            for one in (base, model):
                start = time.process_time()
                for batch in timed:
                    with reading(tasks=batch["task"]):
                        one(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False, logits_to_keep=1)
                seconds[id(one)].append(time.process_time() - start)
        mixtures: list[Any] = [layer.expert for _, layer in expert_layers(model)]
        kept = [delta for mixture in mixtures for delta in (*mixture.deltas, mixture.common)]
        routers: list[Any] = [found.router, *(mixture.router for mixture in mixtures)]
        added = sum(delta.nbytes for delta in kept if delta is not None)
        added += sum(tensor.nbytes for one in routers if one is not None for tensor in one.state().values())
    held = sum(parameter.nbytes for parameter in base.parameters())
    return {"seconds": [min(rounds[1:]) for rounds in seconds.values()], "bytes": [held, added]}


def _show_costs(keys: Sequence[tuple[int, str, str]], store: JSONLines, options: argparse.Namespace) -> None:
    """Print means over the seeds."""
    rows = []
    for kind, name in dict.fromkeys(key[1:] for key in keys):
        found = [store[seed, kind, name] for seed in options.seeds]
        time_over, bytes_over = (fmean(one[what][1] / one[what][0] for one in found) for what in ("seconds", "bytes"))
        rows.append({"kind": kind, "router": name, "time": time_over, "bytes": bytes_over})
    if options.json:
        json.dump({"seeds": options.seeds, "costs": rows}, sys.stdout, indent=2)
        return
    print(
        f"CPU time of a pass over {TIMED} prompts, over the base's, and bytes beside the base, over its own; ", end=""
    )
    print(f"means over seeds {', '.join(map(str, options.seeds))}\n\n| | router | time | bytes |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['kind']} | {row['router']} | {row['time']:.2f} | {row['bytes']:.2f} |")


def _prompts(world: Experts, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return the prompts of some rows in batches, each padded to its longest."""
    found = []
    for batch in _batches(world, examples):
        texts = prompts_of(batch)
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            for rows in (texts, [torch.ones_like(text) for text in texts])
        )
        found.append({"ids": ids, "mask": mask, "task": batch["task"]})
    return found


def _learned(world: Experts, kind: str, way: Way) -> Router | dict[str, Router]:
    """Return a router that has learned the experts, or one for each weight if its scope is a layer."""
    assert way.router is not None
    router, tasks = way.router(), world.tasks
    if router.scope == "linear":
        experts = open_experts([world.expert(kind, task) for task in tasks])
        taken = [open_statistics(expert, router.needs) for expert in experts] if router.needs else []
        return by_weight(router, world.model, experts, taken)
    if isinstance(router, Oracle):
        router.tasks = {task: number for number, task in enumerate(tasks)}
        router.learn([None] * len(tasks), [])
        return router
    learning = world.mixture(tasks)
    learning.eval_limit = None  # which holds for test rows
    inputs = learning.input_examples(["train", "validation"])
    parts = router.needs == "prompt_parts"
    vectors = [_vectors(world, spread_evenly(inputs[task], way.inputs), router.depths, parts) for task in tasks]
    router.learn([None] * len(tasks), vectors)
    return router


def _numbers(world: Experts, router: Router | None, examples: Sequence[Example]) -> list[int]:
    """Return the expert that each row takes most of; the number of experts stands for the fallback."""
    tasks = world.tasks
    if router is None:
        return [len(tasks)] * len(examples)
    if isinstance(router, Oracle):
        return [router.tasks.get(one.task, len(tasks)) for one in examples]
    gates = router(_vectors(world, examples, router.depths))
    return gates.ids.gather(1, gates.weights.argmax(1, keepdim=True))[:, 0].tolist()


def _batches(world: Experts, examples: Sequence[Example]) -> list[dict[str, Any]]:
    collate = Collator(RowTokenizer(world.tokenizer).pad_id)
    ordered = sorted(examples, key=lambda one: len(one.tokens.ids))
    return [collate(ordered[start : start + BATCH]) for start in range(0, len(ordered), BATCH)]


def _vectors(world: Experts, examples: Sequence[Example], depths: Sequence[float], parts: bool = False) -> Tensor:
    """Return the prompts of rows as a router sees them, in the order of the rows, or with parts, in any order."""
    order = sorted(range(len(examples)), key=lambda row: examples[row].tokens.prompt)
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    if parts:
        collate = Collator(RowTokenizer(world.tokenizer).pad_id)
        given = [collate([examples[row] for row in rows]) for rows in batches]
        found = prompts(world.model, given, [], parts=True)
        return torch.cat([found[name_of(depth)].values for depth in depths], 1)
    vectors: dict[int, Tensor] = {}
    for rows in batches:
        texts = [examples[row].tokens.ids[: examples[row].tokens.prompt] for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        vectors |= dict(zip(rows, torch.cat(prompt_vectors(world.model, ids, mask, depths), 1), strict=True))
    return torch.stack([vectors[row] for row in range(len(examples))])


def _stripped(world: Experts) -> Experts:
    """Return the same world with task files whose prompts have no instruction."""
    assert isinstance(world, RealExperts)
    folder = world.work / "stripped"
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(world.data.glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            first, line_end, rest = row["input"].partition("\n")
            row["input"] = rest if line_end and len(first) < 60 else row["input"].partition(": ")[2] or row["input"]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not (folder / file.name).exists():
            (folder / file.name).write_text(text, encoding="utf-8")
    return replace(world, data=folder)


def _row(kind: str, name: str, store: JSONLines, options: argparse.Namespace) -> dict[str, Any]:
    found = [store[seed, kind, name] for seed in options.seeds]
    alone = [store[seed, kind, "the experts alone"] for seed in options.seeds] if _has_alone(options) else None
    row: dict[str, Any] = {"kind": kind, "router": name}
    for score in SCORES:
        held_in = _pairs(found, score, held_in=True)
        row[score] = fmean(held_in.values())
        row[f"held out {score}"] = fmean(_pairs(found, score, held_in=False).values())
        if alone and score == "exact_match":
            reference = _pairs(alone, score, held_in=True)
            row["kept"] = row[score] / max(fmean(reference.values()), 1e-9)
            row["difference"] = interval(held_in, reference)
    columns = {"right": ("right", True), "rejected": ("rejected", True), "held out rejected": ("rejected", False)}
    for title, (column, of_experts) in columns.items():
        shares = _pairs(found, column, held_in=of_experts).values()
        row[title] = None if None in shares else fmean(shares)
    return row


def _has_alone(options: argparse.Namespace) -> bool:
    return "the experts alone" in options.routers


def _pairs(results: Sequence[dict[str, Any]], column: str, held_in: bool) -> dict[tuple[int, str], float]:
    """Return a score by pair of seed and task: of the tasks that experts were trained on, or of the others."""
    return {
        (r["piece"][0], task): value
        for r in results
        for task, value in r[column].items()
        if (task in r["right"]) == held_in
    }


def _print(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> None:
    print(
        f"exact match in % / loss in nats per token, means over tasks and seeds {', '.join(map(str, seeds))}; kept: of"
    )
    print("kept: of the experts alone, with the 95 % interval of the difference; right: rows at their own expert")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        heading = "router | held in | kept, % | | right, % | rejected, % | held out | rejected, held out, %"
        print(f"\n{kind}\n\n| {heading} |\n" + "|---" * 8 + "|")
        for row in (row for row in rows if row["kind"] == kind):
            low, high = row.get("difference", (0.0, 0.0))
            cells = [row["router"], f"{100 * row['exact_match']:.1f} / {row['loss']:.2f}"]
            cells += [f"{100 * row['kept']:.0f}" if "kept" in row else "", f"[{100 * low:+.1f}, {100 * high:+.1f}]"]
            right, *rejected = (
                "" if row[title] is None else f"{100 * row[title]:.1f}"
                for title in ("right", "rejected", "held out rejected")
            )
            cells += [right, rejected[0], f"{100 * row['held out exact_match']:.1f} / {row['held out loss']:.2f}"]
            print("| " + " | ".join([*cells, rejected[1]]) + " |")


if __name__ == "__main__":
    main()
