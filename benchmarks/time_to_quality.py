"""What it takes from the command to a stored expert of a given quality, beside PEFT's LoRA under transformers' Trainer.

Every run is a command in a process of its own, on one thread: `modular-experts fit ... --out` for ours, and
`peft_trainer.py` (LoRA of rank 16 on all linear layers, the adapter saved) for PEFT. Both read the same rows of a task
file, 8 in a step, with the same warm-up and linear decay, and neither validates nor writes checkpoints. A stored expert
is measured afterwards, outside of the clock: the loss per target token over the same validation rows by the same code.

The target is PEFT's loss after 100 steps at the best rate of `PEFT_RATES`. Each of our kinds, at the rate in
`CONTENDERS`, looks for the fewest steps of `LADDER` after which it is reached, each try a run with a schedule of that
length. The table has the CPU seconds of that run over PEFT's, also with the choosing of supports left out, and those of
a run of one step that stores nothing, the start-up. With `--rounds`, PEFT's run, ours and the start-ups are repeated in
turn, and the medians count.

    MODULAR_EXPERTS_DATA=DIR python benchmarks/time_to_quality.py --out FILE.jsonl [--task NAME] [--quick] [--json]

About 75 minutes for a task, of which the rounds take half. It goes on where it was interrupted; `--limit` ends it
before a run that would start later than so many seconds, so that the work can be divided. `--quick` is in small: the
numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from step_report import machine

from modular_experts import Base, TaskMixture, applied, import_expert, open_expert
from modular_experts.evaluation import batch_losses

HERE = Path(__file__).parent
PEFT, STEPS = "LoRA, PEFT", 100
PEFT_RATES = [1e-3, 3e-3, 5e-3]
LADDER = [60, 80, 100, 125]
SPARSE = "--expert SparseExpert --expert.keep_ratio 0.05 --expert.granularity"
CONTENDERS: dict[str, tuple[str, float]] = {
    "LoRA, ours": ("--expert LoRAExpert --expert.rank 16 --expert.alpha 32", 3e-3),
    "entries": (f"{SPARSE} element", 2e-3),
    "tiles": (f"{SPARSE} block", 2e-3),
    "rows": (f"{SPARSE} row", 2e-3),
    "full": ("--expert FullExpert", 1e-4),
}
"""Our kinds: options of `fit`, and the rate."""

Run = dict[str, Any]


class Race:
    """Runs commands for one task, and keeps what they took in a file of JSON lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.file, self.began = options, Path(options.out), time.time()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.data = str(Path(options.data).resolve() / f"{options.task}.jsonl")
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.runs: list[Run] = [json.loads(line) for line in lines]
        self.ran = 0
        self.base = Base.open(Path(options.model).resolve())
        self._rows: list[Any] | None = None

    def run(self, kind: str, rate: float, steps: int, number: int = 0, keep: bool = True) -> Run:
        """Return the `number`-th run of its kind, rate and steps; without `keep` it stores and measures nothing."""
        key = {"task": self.options.task, "kind": kind, "rate": rate, "steps": steps, "number": number, "kept": keep}
        key["settings"] = "" if kind == PEFT else f"{CONTENDERS[kind][0]} {self.options.more}".strip()
        known = [run for run in self.runs if all(run.get(name) == value for name, value in key.items())]
        if known:
            return known[0]
        if self.ran and time.time() - self.began > self.options.limit:
            raise SystemExit(f"stopped after {self.options.limit} s; the same command goes on")
        with tempfile.TemporaryDirectory() as place:
            out = Path(place, "expert")
            taken = _taken(self._words(kind, rate, steps, out if keep else None, place), place)
            found = key | taken | (self._measured(out) if keep else {})
        self.ran += 1
        self.runs.append(found)
        with self.file.open("a") as lines:
            lines.write(json.dumps(found) + "\n")
        print(found, file=sys.stderr, flush=True)
        return found

    def _words(self, kind: str, rate: float, steps: int, out: Path | None, place: str) -> list[str]:
        kept = [] if out is None else ["--out", str(out)]
        if kind == PEFT:
            words = [str(HERE / "peft_trainer.py"), "--base", str(self.base.directory), "--data", self.data]
            return [sys.executable, *words, "--rate", str(rate), "--steps", str(steps), *kept]
        words = ["-m", "modular_experts", "fit", "--base", str(self.base.directory), "--tasks", self.data]
        words += ["--modules", "all-linear", *CONTENDERS[kind][0].split(), "--learning-rate", str(rate)]
        words += ["--steps", str(steps), "--trainer.limit_val_batches", "0", "--trainer.enable_checkpointing", "false"]
        return [sys.executable, *words, "--trainer.default_root_dir", place, *self.options.more.split(), *kept]

    def _measured(self, out: Path) -> Run:
        """Return the validation loss of a stored expert, and what its choices of supports took."""
        ours = (out / "expert.json").exists()
        stored = open_expert(out) if ours else import_expert(out, out.with_name("imported"), self.base)
        model: Any = self.base.load("float32")
        if self._rows is None:
            data = TaskMixture([self.data], self.base.tokenizer(), eval_batch_size=32, eval_limit=self.options.rows)
            data.setup("validate")
            self._rows = list(data.val_dataloader())
        total = tokens = 0.0
        with applied(model, [stored], check=False), torch.no_grad():
            for batch in self._rows:
                sums, counts = batch_losses(model, batch)
                total, tokens = total + float(sums.sum()), tokens + int(counts.sum())
        costs = stored.record.get("costs", {})
        return {"loss": total / tokens, "choosing": costs.get("selection_seconds", 0.0)}

    def fewest(self, kind: str, rate: float, target: float) -> Run | None:
        """Return the run of the fewest steps of the ladder that reaches the loss, or None; found by halving."""
        low, high, best = 0, len(self.options.ladder), None
        while low < high:
            # The lower of two: a shorter run costs less to try.
            middle = (low + high - 1) // 2
            tried = self.run(kind, rate, self.options.ladder[middle])
            if tried["loss"] <= target:
                high, best = middle, tried
            else:
                low = middle + 1
        return best


def _taken(words: list[str], place: str) -> Run:
    """Return the CPU seconds and the seconds of a command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "seconds": time.perf_counter() - started}


def race(options: argparse.Namespace) -> dict[str, Any]:
    """Return the target, and a row for PEFT and for each kind."""
    ours = Race(options)
    kinds = {PEFT: options.rates[0]} | {kind: CONTENDERS[kind][1] for kind in options.kinds}
    for number in range(options.rounds):  # interleaved: a round has each start-up once
        for kind, rate in kinds.items():
            ours.run(kind, rate, 1, number, keep=False)
    tried = [ours.run(PEFT, rate, options.steps) for rate in options.rates]
    best = min(tried, key=lambda run: run["loss"])
    found: dict[str, Run | None] = {PEFT: best}
    for kind in options.kinds:
        found[kind] = ours.fewest(kind, CONTENDERS[kind][1], best["loss"])
    rows = []
    for number in range(options.rounds):  # and each whole run once
        for kind, run in found.items():
            if run is not None:
                ours.run(kind, run["rate"], run["steps"], number)
    for kind, run in found.items():
        starts = [ours.run(kind, kinds[kind], 1, number, keep=False) for number in range(options.rounds)]
        rate = kinds[kind] if run is None else run["rate"]
        whole = [] if run is None else [ours.run(kind, rate, run["steps"], number) for number in range(options.rounds)]
        row = {"kind": kind, "rate": rate, "start": _median(starts)}
        if run is not None:
            # The clock of choosing is the wall's; its share of the run's own is taken from the CPU time.
            share = statistics.median(one["choosing"] / one["seconds"] for one in whole)
            row |= {"steps": run["steps"], "loss": run["loss"], "cpu": _median(whole)}
            row |= {"seconds": statistics.median(one["seconds"] for one in whole), "choosing": share}
        rows.append(row)
    return {"machine": machine(), "task": options.task, "rounds": options.rounds, "target": best["loss"], "rows": rows}


def _median(runs: list[Run]) -> float:
    return statistics.median(run["cpu"] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="time_to_quality.jsonl", help="file of JSON lines that keeps the runs")
    parser.add_argument("--task", default="clinc_banking", help="name of a file in --data, without .jsonl")
    parser.add_argument("--data", default=os.environ.get("MODULAR_EXPERTS_DATA", "."))
    parser.add_argument("--model", default=str(HERE.parent / ".cache" / "smollm2"))
    parser.add_argument("--kinds", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--rates", nargs="+", type=float, default=PEFT_RATES, help="of PEFT's LoRA")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="the most validation rows; all of them if not given")
    parser.add_argument("--more", default="", help="more options of our fit")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no run starts")
    parser.add_argument("--quick", action="store_true", help="two steps at one rate: the numbers mean nothing")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    options = parser.parse_args()
    options.steps, options.ladder = STEPS, LADDER
    if options.quick:
        options.steps, options.ladder, options.rounds, options.rates = 2, [2], 1, PEFT_RATES[:1]
    torch.set_num_threads(1)
    report = race(options)
    if options.json:
        print(json.dumps(report))
        return
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"{report['task']}: PEFT's LoRA reaches a loss of {report['target']:.4f}; CPU seconds over its own\n")
    print("| kind | rate | steps | loss | to the loss | without choosing | start-up |\n|---|---|---|---|---|---|---|")
    first = report["rows"][0]
    for row in report["rows"]:
        start = f"{row['start'] / first['start']:.2f}"
        if "cpu" not in row:
            print(f"| {row['kind']} | {row['rate']:g} | | not reached | | | {start} |")
            continue
        ratio = row["cpu"] / first["cpu"]
        cells = f"{row['steps']} | {row['loss']:.4f} | {ratio:.2f} | {ratio * (1 - row['choosing']):.2f} | {start}"
        print(f"| {row['kind']} | {row['rate']:g} | {cells} |")
    print(f"\nPEFT: {first['cpu']:.0f} CPU seconds to the adapter, {first['start']:.1f} to start")


if __name__ == "__main__":
    main()
