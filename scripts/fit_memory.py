"""Print how far off predicted memory is, on bases of random weights with the shapes of real ones.

A line of the work `fit` is one kind of expert of all linear layers, beside a base in bfloat16, nf4 or int8. One process
predicts the memory (`estimate_fit(..., fit_into="1TB")`), and another takes two steps of the fit and reads the most
memory that it had in them. `MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536`, set before, leave no gaps in
the memory. The other works take twenty random experts of the kind: `merge` is their TIES merge, `apply` writes base
plus one of them and loads both to compare them, and `route` passes a row through the base with all of them behind
`Arrow`. Their predictions are the merge's own (`--dry-run`), and the bytes of the base and of the experts as they are
held beside it, each beside a process that has only imported the package.

    python scripts/fit_memory.py --work FOLDER [--shapes Qwen3-1.7B Phi-3-mini] [--forms nf4] [--works merge route]
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedTokenizerFast, Qwen3Config, Qwen3MoeConfig

from modular_experts import LoRAExpert, SparseExpert, apply, estimate_fit, fit, merge
from modular_experts.base import Base
from modular_experts.deltas import Delta, LowRank, Sparse
from modular_experts.injection.attach import attached
from modular_experts.library import make_record, open_experts, write_expert
from modular_experts.merging.estimate import estimate_merge
from modular_experts.merging.merged import Merged
from modular_experts.merging.route import route
from modular_experts.routing import Arrow
from modular_experts.routing.mixture import Held
from modular_experts.training.activations import high_water

QWEN: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "head_dim": 128}
QWEN |= {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}
SMALL = QWEN | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "head_dim": 64}
SMALL |= {"vocab_size": 4096, "tie_word_embeddings": False}
MIXED = SMALL | {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
MIXED |= {"moe_intermediate_size": 512, "num_experts": 16, "num_experts_per_tok": 4}
TINY = SMALL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
SHAPES: dict[str, Any] = {
    "Qwen3-109M": Qwen3Config(**SMALL),
    "Qwen3-MoE-111M": Qwen3MoeConfig(**MIXED),
    "Qwen3-1.7B": Qwen3Config(**QWEN),
    "Phi-3-mini": Phi3Config(),  # whose defaults are that shape, of 3.8 billion parameters
    "tiny": Qwen3Config(**TINY),
}
KINDS: dict[str, Any] = {
    "1 % of the entries": partial(SparseExpert, keep_ratio=0.01),
    "5 % of the entries": partial(SparseExpert, keep_ratio=0.05),
    "LoRA of rank 16": partial(LoRAExpert, rank=16),
}
FORMS = ("bfloat16", "nf4", "int8")


def make_base(folder: Path, config: Any) -> None:
    """Write a base of random weights in bfloat16 with a tokenizer of numbers, a weight in memory at a time."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    drawn, names, total = torch.Generator().manual_seed(0), dict[str, str](), 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, weight) in enumerate(model.named_parameters()):
        values = torch.empty(weight.shape).normal_(0, 0.02, generator=drawn).bfloat16()  # faster than in bfloat16
        names[name], total = f"model-{number}.safetensors", total + values.nbytes
        save_file({name: torch.ones_like(values) if values.ndim == 1 else values}, folder / names[name])
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of ten words, the digits."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {str(number): 3 + number for number in range(10)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def settings(base: Path, form: str, kind: str, rows: int, length: int) -> dict[str, Any]:
    """Return the arguments of the fit of a line; its rows lie beside the base."""
    text = {"input": "1 2 3 4 " * (length // 4), "target": "5 6", "split": "train"}
    (base / "numbers.jsonl").write_text(f"{json.dumps(text)}\n" * 4 * rows)
    given = {"base": str(base), "tasks": [str(base / "numbers.jsonl")], "expert": KINDS[kind], "modules": "all-linear"}
    trainer = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "precision": "bf16-mixed"}
    given |= {"steps": 2, "batch_size": rows, "data": {"max_length": length}}
    given["model"] = {"dtype": "bfloat16", "gradient_checkpointing": False}
    return given | {"trainer": trainer} | ({} if form == "bfloat16" else {"quantise": form})


class FromFirstStep(Callback):
    """Lets Linux forget the most memory so far, which counts files that quantising read and that need not stay."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")


def random_deltas(base: Base, kind: str, seed: int) -> Iterator[tuple[str, Delta]]:
    """Yield a random delta of each linear layer but the head, of the kind's size."""
    drawn, size = torch.Generator().manual_seed(seed), KINDS[kind].keywords
    for name, shape in base.structure.shapes.items():
        if not name.endswith("proj.weight"):
            continue
        if rank := size.get("rank"):
            up, down = (torch.randn(one, generator=drawn) for one in ((shape[0], rank), (rank, shape[1])))
            yield name, LowRank(0.01 * up, 0.01 * down)
            continue
        count = int(size["keep_ratio"] * shape.numel())
        places = torch.randint(shape.numel(), (count,), generator=drawn, dtype=torch.int32).unique()
        yield name, Sparse(places, 0.01 * torch.randn(len(places), generator=drawn), shape)


def library_of(place: Path, kind: str) -> list[Path]:
    """Return the places of twenty random experts of a base, which are made at the first time."""
    base, folder = Base.open(place), place.parent / f"{place.name}-{kind.replace(' ', '-').replace('%', 'percent')}"
    places = [folder / f"expert-{number}" for number in range(20)]
    for number, one in enumerate(places):
        if not one.exists():
            write_expert(one, random_deltas(base, kind, number), make_record("random", base.facts, [one.name]))
    return places


def predicted(work: str, *line: Any) -> int:
    """Return the bytes that a work is told to take."""
    if work == "fit":
        return estimate_fit(**settings(*line), fit_into="1TB").peak
    experts, python = open_experts(library_of(line[0], line[2])), high_water(torch.device("cpu"))
    if work == "merge":
        return python + max(weight.peak for weight in estimate_merge(Merged(experts, "TIES")))
    weights = sum(2 * one.numel() for one in Base.open(line[0]).structure.model.parameters())
    if work == "apply":  # which goes on with its experts' files closed
        return python + weights
    like = torch.empty(0, dtype=torch.bfloat16)
    return python + weights + len(experts) * sum(Held(experts[0][name], like).nbytes for name in experts[0])


def take(work: str, *line: Any) -> None:
    if work == "fit":
        given = settings(*line)
        fit(**given | {"trainer": given["trainer"] | {"callbacks": [FromFirstStep()]}})
        return
    places = library_of(line[0], line[2])
    out = places[0].parent / work
    if work == "merge":
        merge(places, "TIES", out, overwrite=True)
    elif work == "apply":
        apply(places[0], out, overwrite=True)
    else:
        routed, model = route(places, out, Arrow(), overwrite=True), Base.open(line[0]).load("bfloat16")
        with torch.no_grad(), attached(model, routed, check=False):
            model(input_ids=torch.arange(line[4])[None] % 10 + 3, use_cache=False)


def measured(way: str, *line: Any) -> int:
    """Return the bytes that a work takes as they are predicted, or the most that this process had when it was done."""
    if way == "predicted":
        return predicted(*line)
    take(*line)
    return high_water(torch.device("cpu"))


def in_own_process(way: str, *line: Any) -> int:
    command = [sys.executable, __file__, "--line", way, *map(str, line)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the bases, which take 2 bytes a parameter and stay there")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["Qwen3-109M", "Qwen3-MoE-111M"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["bfloat16"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["LoRA of rank 16"])
    parser.add_argument("--works", nargs="+", choices=("fit", "merge", "apply", "route"), default=["fit"])
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--line", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.line:
        way, work, base, form, kind, rows, length = options.line
        print(measured(way, work, Path(base), form, kind, int(rows), int(length)))
        return
    print(
        "| base | work | form | experts of all linear layers | predicted, MB | taken, MB | apart |\n" + 7 * "|---" + "|"
    )
    lines = itertools.product(options.shapes, options.works, options.forms, options.kinds)
    for shape, work, form, kind in lines:
        if not (options.work / shape / "config.json").exists():
            make_base(options.work / shape, SHAPES[shape])
        line = (work, options.work / shape, form, kind, options.rows, options.length)
        predicted, taken = (in_own_process(way, *line) / 1e6 for way in ("predicted", "taken"))
        apart = f"{100 * (predicted / taken - 1):+.1f} %"
        print(f"| {shape} | {work} | {form} | {kind} | {predicted:,.0f} | {taken:,.0f} | {apart} |", flush=True)


if __name__ == "__main__":
    main()
