"""What it takes from the command to a stored expert of a given quality, beside PEFT's LoRA under transformers' Trainer.

Every run is a command in a process of its own, on one thread: `modular-experts fit ... --out` for ours, and
`peft_trainer.py` (LoRA of rank 16 on all linear layers, the adapter saved) for PEFT. Both read the same rows of a task
file, 8 in a step, with the same warm-up and linear decay, and neither validates nor writes checkpoints. A stored expert
is measured afterwards, outside of the clock: the loss per target token over the same validation rows by the same code.
The `Trainer` clips gradients, as it does by default, and `--more "--trainer.gradient_clip_val 1.0"` lets ours do so.

A round has a seed: PEFT's run of `--steps`, whose loss is the target of the round, and then a run of each of `--tries`,
KIND:RATE:STEPS, with a schedule of that length. The table has, over the rounds, the mean loss, how far the losses lie
above the targets, in how many rounds the target is reached, and the median and range of the CPU seconds over PEFT's of
the same round. A try of one step stores nothing: it is the start-up, over PEFT's of one step.

    MODULAR_EXPERTS_DATA=DIR python benchmarks/time_to_quality.py --out FILE.jsonl [--task NAME] [--quick] [--json]

About a quarter of an hour for a round. It goes on where it was interrupted; `--limit` ends it before a run that would
start later than so many seconds, so that the work can be divided. `--quick` is in small: the numbers mean nothing.
"""

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
from measuring import Parser, output, print_machine

from modular_experts import Base, TaskMixture, import_expert, open_expert
from modular_experts.evaluation import batch_losses
from modular_experts.injection.attach import attached

HERE = Path(__file__).parent
PEFT = "LoRA, PEFT"
LORA = "--expert LoRAExpert --expert.rank 16 --expert.alpha 32"
SPARSE = "--expert SparseExpert --expert.keep_ratio 0.05 --expert.granularity"
KINDS = {
    PEFT: "",
    "LoRA": LORA,
    "LoRA-of-answers": f"{LORA} --acts_on answer",
    "entries": f"{SPARSE} element",
    "entries-of-answers": f"{SPARSE} element --acts_on answer",
    "tiles": f"{SPARSE} block",
    "rows": f"{SPARSE} row",
    "full": "--expert FullExpert",
}
"""The kinds, with the options of `fit` that make ours."""

TRIES = ["rows:2e-3:100", "rows:2e-3:110", "rows:2e-3:125", "LoRA:3e-3:100", "LoRA:3e-3:1"]

Run = dict[str, Any]


class Race:
    """Runs commands for one task, and keeps what they took in a file of JSON lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.file, self.began = options, Path(options.out), time.time()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.data = str(Path(options.data).resolve() / f"{options.task}.jsonl")
        if options.words:
            self.data = self._longer(self.data)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.runs: list[Run] = [json.loads(line) for line in lines]
        self.ran = 0
        self.base = Base.open(Path(options.model).resolve())
        self._rows: list[Any] | None = None

    def run(self, kind: str, rate: float, steps: int, seed: int) -> Run:
        """Return what a run took, and how good its expert is; one of a single step stores nothing."""
        key = {"task": self.options.task, "words": self.options.words, "kind": kind, "rate": rate, "steps": steps}
        key["seed"] = seed
        key["settings"] = "" if kind == PEFT else f"{KINDS[kind]} {self.options.more}".strip()
        known = [run for run in self.runs if all(run.get(name) == value for name, value in key.items())]
        if known:
            return known[0]
        if self.ran and time.time() - self.began > self.options.limit:
            raise SystemExit(f"stopped after {self.options.limit} s; the same command goes on")
        with tempfile.TemporaryDirectory() as place:
            out = Path(place, "expert")
            words = self._words(kind, rate, steps, seed, place) + (["--out", str(out)] if steps > 1 else [])
            taken = _taken(words, place)
            found = key | taken | (self._measured(out) if steps > 1 else {})
        self.ran += 1
        self.runs.append(found)
        with self.file.open("a") as lines:
            lines.write(json.dumps(found) + "\n")
        print(found, file=sys.stderr, flush=True)
        return found

    def _longer(self, data: str) -> str:
        """Return a file beside the results whose prompts begin with further words, the same in all rows."""
        file = self.file.resolve().with_name(f"{self.options.task}-{self.options.words}.jsonl")
        rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
        before = "the customer wrote this to us today " * self.options.words
        text = " ".join(before.split()[: self.options.words])
        file.write_text("".join(json.dumps(row | {"input": f"{text} {row['input']}"}) + "\n" for row in rows))
        return str(file)

    def _words(self, kind: str, rate: float, steps: int, seed: int, place: str) -> list[str]:
        base = str(self.base.directory)
        if kind == PEFT:
            words = [str(HERE / "peft_trainer.py"), "--base", base, "--data", self.data, "--rate", str(rate)]
            return [sys.executable, *words, "--steps", str(steps), "--seed", str(seed)]
        words = ["-m", "modular_experts", "fit", "--base", base, "--tasks", self.data, "--modules", "all-linear"]
        words += [*KINDS[kind].split(), "--learning-rate", str(rate), "--steps", str(steps)]
        words += ["--seed", str(seed), "--trainer.default_root_dir", place]
        words += ["--trainer.limit_val_batches", "0", "--trainer.enable_checkpointing", "false"]
        return [sys.executable, *words, *self.options.more.split()]

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
        with attached(model, [stored], check=False), torch.no_grad():
            for batch in self._rows:
                sums, counts = batch_losses(model, batch)
                total, tokens = total + float(sums.sum()), tokens + int(counts.sum())
        costs = stored.record.get("costs", {})
        return {"loss": total / tokens, "choosing": costs.get("selection_seconds", 0.0)}


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
    """Return the targets, one for each seed, and a row for each try."""
    ours = Race(options)
    named = [words.split(":") for words in options.tries]
    tries = list(dict.fromkeys((kind, float(rate), min(int(steps), options.most)) for kind, rate, steps in named))
    found: dict[tuple[str, float, int], list[tuple[Run, Run]]] = {one: [] for one in tries}
    targets = []
    for seed in options.seeds:  # interleaved: a round has each run once
        targets.append(ours.run(PEFT, options.rate, min(options.steps, options.most), seed))
        for kind, rate, steps in tries:
            peer = targets[-1] if steps > 1 else ours.run(PEFT, options.rate, 1, seed)
            found[kind, rate, steps].append((ours.run(kind, rate, steps, seed), peer))
    rows = []
    for (kind, rate, steps), runs in found.items():
        row: dict[str, Any] = {"kind": kind, "rate": rate, "steps": steps}
        row["cpu"] = [run["cpu"] / peer["cpu"] for run, peer in runs]
        if steps > 1:
            row |= {"loss": [run["loss"] for run, _ in runs], "gap": [run["loss"] - peer["loss"] for run, peer in runs]}
            # The clock of choosing is the wall's, so its share is taken of the wall's time.
            row["choosing"] = statistics.median(run["choosing"] / run["seconds"] for run, _ in runs)
        rows.append(row)
    peer = {"loss": [run["loss"] for run in targets], "cpu": [run["cpu"] for run in targets]}
    return {"task": options.task, "seeds": options.seeds, "peer": peer, "rows": rows}


def main() -> None:
    parser = Parser(__doc__, quick="one round, two steps: the numbers mean nothing")
    parser.add_argument("--out", default="time_to_quality.jsonl", help="file of JSON lines that keeps the runs")
    parser.add_argument("--task", default="clinc_banking", help="name of a file in --data, without .jsonl")
    parser.add_argument("--data", default=os.environ.get("MODULAR_EXPERTS_DATA", "."))
    parser.add_argument("--model", default=str(HERE.parent / ".cache" / "smollm2"))
    parser.add_argument("--tries", nargs="+", default=TRIES, metavar="KIND:RATE:STEPS", help=f"of {list(KINDS)}")
    parser.add_argument("--rate", type=float, default=3e-3, help="of PEFT's LoRA, whose loss is the target")
    parser.add_argument("--steps", type=int, default=100, help="of PEFT's LoRA")
    parser.add_argument("--words", type=int, default=0, help="more words before each prompt, the same in all rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="a round for each")
    parser.add_argument("--rows", type=int, help="the most validation rows; all of them if not given")
    parser.add_argument("--more", default="", help="more options of our fit")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no run starts")
    options = parser.parse_args()
    options.most = 2 if options.quick else sys.maxsize
    options.seeds = options.seeds[:1] if options.quick else options.seeds
    torch.set_num_threads(1)
    output(options, race(options), show)


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    print_machine(report)
    peer, seeds = report["peer"], report["seeds"]
    losses, cpu = ", ".join(f"{loss:.4f}" for loss in peer["loss"]), statistics.median(peer["cpu"])
    print(f"{report['task']}, seeds {seeds}: PEFT's LoRA reaches losses of {losses} in {cpu:.0f} CPU seconds\n")
    print("| kind | rate | steps | loss | above the target | reached | CPU over PEFT's | choosing |")
    print("|---|---|---|---|---|---|---|---|")
    for row in report["rows"]:
        ratios = f"{statistics.median(row['cpu']):.2f} ({min(row['cpu']):.2f} to {max(row['cpu']):.2f})"
        cells = [row["kind"], f"{row['rate']:g}", row["steps"], "", "", "", ratios, ""]
        if row["steps"] > 1:
            gaps = row["gap"]
            reached = f"{sum(gap <= 0 for gap in gaps)} of {len(gaps)}"
            cells[3:6] = [f"{statistics.mean(row['loss']):.4f}", f"{min(gaps):+.4f} to {max(gaps):+.4f}", reached]
            cells[7] = f"{row['choosing']:.1%}"
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
