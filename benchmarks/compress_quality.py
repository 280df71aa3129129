"""How much perplexity a base loses with its parameters: by search and correction, by ranking alone, by magnitude.

`compress` makes a base of 90, 80 and 70 % of the parameters from BASE and the rows of eight task files in DATA.
Training rows rank and correct, validation rows measure the candidates of the search, and the perplexity that is shown
is on test rows. One line has the search, one only its first candidate, in which all blocks and heads stay and each
block loses the MLP channels that contribute least. Beside both stands the removal of the channels with the smallest
weights. Then a LoRA is trained on the base and on each smaller one, and tested.

    python benchmarks/compress_quality.py [BASE DATA] [--keep 0.9 0.8 0.7] [--expert snips_intent] [--work DIR]

What is done stays in `--work`, so a run that was stopped goes on where it was. On SmolLM2 a ratio takes about ten
minutes of CPU time, and each expert two. `--quick` measures less of everything, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modular_experts.__main__ import main as command
from modular_experts.compress import compress
from modular_experts.data import TaskMixture
from modular_experts.evaluation import evaluate
from modular_experts.jobs import JSONLines

FILES = ["snips_intent", "snips_slots", "clinc_travel", "banking77", "blimp_pick", "gsm8k_number", "country_capital"]
FILES += ["derive_german"]
QUICK = {"multiple": 4, "slack": 0.1, "tokens": 512, "search_tokens": 128, "test_tokens": 256, "length": 64}


def main() -> None:
    """Measure what the store lacks, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=".cache/smollm2", help="directory of a base: .cache/smollm2")
    data = os.environ.get("MODULAR_EXPERTS_DATA", "../shared/data")
    parser.add_argument("data", nargs="?", default=data, help="directory of the task files: MODULAR_EXPERTS_DATA")
    parser.add_argument("--files", nargs="+", default=FILES, help="names of the task files")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--evaluations", type=int, default=48, help="candidates of a search")
    parser.add_argument("--expert", default="snips_intent", help="task on which an expert is trained")
    parser.add_argument("--steps", type=int, default=100, help="steps of that training")
    parser.add_argument("--work", help="directory that keeps what is done; a temporary one if not given")
    parser.add_argument("--quick", action="store_true", help="measure little, to see that it works")
    parser.add_argument("--json", action="store_true", help="print the numbers for a program")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(chosen.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        tasks = [str(Path(chosen.data, f"{name}.jsonl")) for name in chosen.files]
        settings = QUICK if chosen.quick else {}
        if chosen.quick:
            chosen.evaluations, chosen.steps = 6, 4
        store = JSONLines(work / "results.jsonl")
        places = {1.0: chosen.base}
        for keep in chosen.keep:
            for name, evaluations in (("ranking alone", 1), ("searched", chosen.evaluations)):
                out = places[keep] = str(work / f"{name.replace(' ', '-')}-{keep:g}")
                _once(store, (name, keep), partial(_measured, chosen.base, tasks, out, keep, evaluations, settings))
        for keep, place in places.items():
            _once(store, ("expert", keep), partial(_trained, place, chosen, work / f"expert-{keep:g}"))
    found = [{"what": key[0], "keep": key[1], **result} for key, result in store.items()]
    if chosen.json:
        print(json.dumps(found))
        return
    lines = [one for one in found if one["what"] != "expert"]
    print(
        "| keep | members by | blocks | groups | channels | base | magnitude | cut | corrected | over magnitude | CPU |"
    )
    print("|---" * 11 + "|")
    for one in lines:
        sizes = [str(len(one["blocks"])), *(f"{part} of {whole}" for part, whole in one["sizes"].values())]
        shown = [one["perplexity"].get(key) for key in ("base", "magnitude", "cut", "reformed")]
        ratio = f"{shown[3] / shown[1]:.2g}" if shown[1] else ""
        cells = [f"{one['parameters'] / one['base']:.1%}", one["what"], *sizes]
        cells += ["" if value is None else f"{value:.4g}" for value in shown]
        print("| " + " | ".join([*cells, ratio, f"{one['seconds']:.0f} s"]) + " |")
    print(f"\n| keep | loss alone | loss with a LoRA on {chosen.expert} | exact match |\n" + "|---" * 4 + "|")
    for one in found:
        if one["what"] == "expert":
            print(f"| {one['keep']:g} | {one['before']:.3f} | {one['after']:.3f} | {100 * one['exact_match']:.1f} |")


def _once(store: JSONLines, key: tuple[str, float], measure: Callable[[], dict[str, Any]]) -> None:
    if key not in store:
        began = time.process_time()
        result = measure()
        store[key] = result | {"seconds": time.process_time() - began}


def _measured(base: str, tasks: list[str], out: str, keep: float, evaluations: int, settings: Any) -> dict[str, Any]:
    found = compress(base, tasks, out, keep, evaluations=evaluations, overwrite=True, **settings)
    worst = max((layer.residual for layer in found.layers), default=0.0)
    grown = sum(layer.after > layer.before for layer in found.layers)
    parts = {key: getattr(found, key) for key in ("base", "parameters", "blocks", "sizes", "perplexity", "searched")}
    return parts | {"largest residual": worst, "layers with a larger error": grown}


def _trained(base: str, chosen: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Train a LoRA on a base, and return the loss on test rows before and after, and the share of exact answers."""
    file, expert = str(Path(chosen.data, f"{chosen.expert}.jsonl")), str(place / "lora")
    words = ["fit", "--base", base, "--expert", "LoRAExpert", "--modules", "all-linear", "--tasks", file]
    with redirect_stdout(sys.stderr):
        if command([*words, "--steps", str(chosen.steps), "--out", expert, "--overwrite", "true"]):
            raise SystemExit(1)
    rows = evaluate(base, {"before": [], "after": [expert]}, TaskMixture([file], eval_limit=50))
    losses = {model: rows.where(model=model).mean("loss") for model in ("before", "after")}
    return {**losses, "exact_match": rows.where(model="after").mean("exact_match")}


if __name__ == "__main__":
    main()
