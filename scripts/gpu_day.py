"""Measure on a GPU what was built on a CPU: the tests that a GPU changes, steps, merges, mixed rows, the dry run.

Each part runs in a process of its own for at most ten minutes, and gpu.json keeps its rows as soon as they are there,
beside the page gpu.md that shows them. A second call makes the parts that are missing; `--only` makes some again.

    make gpu                                  all parts on one GPU
    make gpu-multi                            tests of several GPUs
    make gpu ARGS='--quick --out FOLDER'      all in small on a CPU, to see that it runs
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import routing_cost
import tokenizers
import torch
from contenders import CONTENDERS, PROJECTIONS, SIZES, Step, Work, _sparse
from measuring import high_water, machine
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from modular_experts import LoRAExpert, SparseExpert, estimate_fit, merge
from modular_experts.base.device import device
from modular_experts.library import write_expert

RESULTS = Path(__file__).resolve().parents[1] / "docs/results"
SECONDS = 600
SEVERAL = "tests of several GPUs"
_SIZES = {"1.7B": (2048, 8192, 24, 32, 32, 49152), "8B": (4096, 14336, 32, 32, 8, 128256)}
SHAPES: dict[str, dict[str, Any]] = {name: dict(zip(SIZES[True], found, strict=True)) for name, found in _SIZES.items()}
SHAPES |= {"135M": SIZES[False], "tiny": SIZES[True]}
COMPARED = ("frozen", "full", "PEFT LoRA", "PEFT SHiRA", "dense, masked", "LoRA", "rows, slices", "columns, slices")
KINDS = [one for one in CONTENDERS if one.name in COMPARED]
KINDS += [_sparse("entries", "element"), _sparse("tiles of 16", "block", block_size=16)]
TRITON = _sparse("tiles of 64, Triton", "block", block_size=64, backend="triton")
OFFLOADED = "inputs of blocks, on the CPU"
"""Its prediction is that of the inputs on the GPU."""
ACTIVATIONS: dict[str, dict[str, Any]] = {"all": {"gradient_checkpointing": False}}
ACTIVATIONS |= {"inputs of blocks": {"gradient_checkpointing": True}, OFFLOADED: {"offload_activations": True}}
Row = dict[str, Any]


def is_gpu() -> bool:
    return device().type == "cuda"


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """Return the median of the seconds of a call, after the work of the device has ended."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        if is_gpu():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def model_of(shape: str) -> Any:
    """Return a frozen model of random weights in bfloat16 on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=shape != "8B", use_cache=False)
    with device():
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)


def steps(shape: str, quick: bool) -> list[Row]:
    """Return what a step of each kind takes, of 4 x 512 tokens; the frozen model passes its gradients on."""
    base, rounds, size = model_of("tiny" if quick else shape), 1 if quick else 7, (2, 16) if quick else (4, 512)
    tokens = torch.randint(base.config.vocab_size, size, device=device())
    vectors = base.get_input_embeddings()(tokens)

    def forward(model: Any) -> torch.Tensor:
        with torch.autocast(device().type, torch.bfloat16):
            return model(inputs_embeds=vectors.detach().requires_grad_(), labels=tokens).loss

    work, rows = Work(base, PROJECTIONS, forward, tokens.numel(), rank=16), list[Row]()
    for kind in [*KINDS, *[TRITON] * is_gpu()]:
        rows.append({"kind": kind.name})
        if is_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            step = Step(kind, work)
            seconds(step, 2)
            took = seconds(step, rounds)
            peak = torch.cuda.max_memory_allocated() if is_gpu() else high_water()
            found = {"trained": step.facts()["trained"], "seconds": took, "tokens a second": tokens.numel() / took}
            rows[-1] |= found | {"peak": peak}
            step.rest()
            del step
        except torch.OutOfMemoryError:
            rows[-1]["failed"] = "does not fit"
    return rows


def merges(quick: bool) -> list[Row]:
    """Return what merges of 8 experts take; they compute on the processor."""
    base, rows = model_of("tiny" if quick else "135M"), []
    with tempfile.TemporaryDirectory() as folder:
        for kind in routing_cost.KINDS:
            places = [Path(folder) / f"{kind}-{number}" for number in range(8)]
            for number, place in enumerate(places):
                write_expert(place, routing_cost.RandomExpert(base, kind, number), routing_cost.RECORD)
            for method in ("TaskArithmetic", "TIES", "IsoC"):
                call = partial(merge, places, method, Path(folder) / "merged", overwrite=True)
                rows.append({"kind": kind, "method": method, "seconds": seconds(call, 1)})
    return rows


@torch.no_grad()
def mixed_rows(quick: bool) -> list[Row]:
    """Return what a batch whose rows have experts of their own takes beside the base alone."""
    base, rows = model_of("tiny" if quick else "135M").eval(), list[Row]()
    models = routing_cost.contenders(base, routing_cost.KINDS)

    def moved(_: Any, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        return arguments, named | {"input_ids": named["input_ids"].to(device())}

    for model, _ in models.values():
        model.to(device()).register_forward_pre_hook(moved, with_kwargs=True)
    for work in routing_cost.WORKS:
        calls = {name: routing_cost.passes(*one, work, base.config.vocab_size) for name, one in models.items()}
        took = {name: (seconds(call, 2), seconds(call, 1 if quick else 7))[1] for name, call in calls.items()}
        rows += [{"work": work, "kind": name, "over the base": took[name] / took["base"]} for name in took]
    return rows


def memory(quick: bool) -> list[Row]:
    """Return the memory of fits as steps measure it, over its prediction without a base."""
    rows, text = [], {"input": "1 2 3 4 " * (4 if quick else 60), "target": "5 6", "split": "train"}
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {str(number): 3 + number for number in range(10)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    how: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "precision": "bf16-mixed"}
    fit = {"model": {"dtype": "bfloat16"}, "batch_size": 8, "steps": 4, "trainer": how}
    for shape in ["tiny"] if quick else ["135M", "1.7B"]:
        with tempfile.TemporaryDirectory() as folder:
            model_of(shape).save_pretrained(folder)
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
            (Path(folder) / "numbers.jsonl").write_text(f"{json.dumps(text)}\n" * 16)
            for kind, (way, more) in itertools.product((SparseExpert, LoRAExpert), ACTIVATIONS.items()):
                rows.append({"shape": shape, "kind": kind.__name__, "activations": way})
                if way == OFFLOADED and not is_gpu():
                    rows[-1]["failed"] = "there is no GPU to leave"
                    continue
                how = fit | {"model": fit["model"] | more}
                call = partial(estimate_fit, folder, [f"{folder}/numbers.jsonl"], kind, "all-linear", **how)
                found = call()
                rows[-1] |= {"predicted": call(fit_into="1TB").peak, "measured": found.peak}
                rows[-1] |= {"seconds of 4 steps": found.seconds["steps"]}
    return rows


def tests(marker: str, quick: bool) -> list[Row]:
    """Run the tests with a marker on the device; quick: only find them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/training/test_on_device.py",
        "-m",
        marker,
        *(["--collect-only"] if quick else []),
    ]
    found = subprocess.run(command, cwd=RESULTS.parents[1], capture_output=True, text=True, check=False)
    return [{"passed": found.returncode == 0, "last line": found.stdout.strip().splitlines()[-1]}]


PARTS: dict[str, Callable[[bool], list[Row]]] = {
    "tests": partial(tests, "gpu"),
    **{f"steps of {shape}": partial(steps, shape) for shape in ("135M", "1.7B", "8B")},
    "merges of 8 experts": merges,
    "rows with experts of their own": mixed_rows,
    "memory beside the dry run": memory,
    SEVERAL: partial(tests, "gpu_multi"),
}


def page(report: dict[str, Any]) -> str:
    """Return the page of a report, a table for each part."""
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = ["# On a GPU", "", "`make gpu` makes this page.", "", f"*{about}*"]
    for name, rows in report["parts"].items():
        keys = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"## {name.capitalize()}", "", f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
        for row in rows:
            cells = [f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in keys]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_own_process(part: str) -> list[Row]:
    """Return the rows of a part, or one row that says why there are none."""
    command = [sys.executable, __file__, "--part", part]
    try:
        found = subprocess.run(command, timeout=SECONDS, stdout=subprocess.PIPE, text=True, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        return [{"failed": f"{type(error).__name__}, see its lines above"}]
    return json.loads(found.stdout.splitlines()[-1])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="make these parts, again if they are there")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: the numbers mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json and gpu.md")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.part:
        print(json.dumps(PARTS[options.part](False)))
        return
    file = options.out / "gpu.json"
    report = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    name = torch.cuda.get_device_name() if is_gpu() else "none"
    report["machine"] = {"GPU": name, **machine()}
    for part in options.only or [one for one in PARTS if one not in report["parts"] and one != SEVERAL]:
        print(f"{part} ...", file=sys.stderr, flush=True)
        report["parts"][part] = PARTS[part](True) if options.quick else in_own_process(part)
        file.write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "gpu.md").write_text(page(report))


if __name__ == "__main__":
    main()
