"""How many bytes eight LoRAs of a 7B model take, one by one, merged, shrunk and routed, and what merging them needs.

No model is loaded. One transformer block of Mistral-7B gets eight LoRAs of rank 16 on all linear layers; a file with
these shapes has the bytes of `show`, `merge --dry-run` states the memory, and both are multiplied by the 32 blocks
where all blocks count.

    python benchmarks/adapters_7b.py [--json] [--quick]      10 seconds; --quick: two LoRAs
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import Parser, output

from modular_experts.deltas import Delta, LowRank
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.library.packing import packed_bytes
from modular_experts.merging.estimate import estimate_merge, largest
from modular_experts.merging.merged import Merged
from modular_experts.text import bytes_text

BLOCKS, VOCABULARY, WIDTH, RANK = 32, 32000, 4096, 16
SHAPES = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (WIDTH, WIDTH)),
    **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (1024, WIDTH)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (14336, WIDTH)),
    "mlp.down_proj": (WIDTH, 14336),
}


def lora(rank: int, seed: int = 0) -> dict[str, Delta]:
    """Return the deltas of a LoRA in one block."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.0.{name}.weight": LowRank(
            torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
        )
        for name, (rows, columns) in SHAPES.items()
    }


def of_all_blocks(deltas: Mapping[str, Delta], encoding: str = "float32") -> int:
    return BLOCKS * sum(packed_bytes(delta, encoding)[0] for delta in deltas.values())


def report(count: int) -> dict[str, Any]:
    entries = BLOCKS * sum(rows * columns for rows, columns in SHAPES.values())
    base = 2 * (entries + 2 * VOCABULARY * WIDTH + (2 * BLOCKS + 1) * WIDTH)
    one = of_all_blocks(lora(RANK))
    found = {
        "the base in bfloat16, and a checkpoint with a merge in it": base,
        "one LoRA as an expert": one,
        f"{count} of them, behind a router": count * one,
        "IsoC of them": of_all_blocks(lora(count * RANK)),
        "a merge of whole matrices": 4 * entries,
        "the same with --dtype bfloat16": 2 * entries,
        "any merge with --rank 16": of_all_blocks(lora(RANK)),
        "any merge with --rank 16 --dtype bfloat16": of_all_blocks(lora(RANK), "bfloat16"),
        f"{count} LoRAs in int8 by shrink": count * of_all_blocks(lora(RANK), "int8"),
        f"{count} LoRAs in int4 by shrink": count * of_all_blocks(lora(RANK), "int4"),
    }
    memory = {}
    with tempfile.TemporaryDirectory() as folder:
        record = make_record("LORA", {"id": "base", "fingerprint": "0" * 64})
        for number in range(count):
            write_expert(Path(folder, f"e{number}"), lora(RANK, number), record)
        experts = [open_expert(Path(folder, f"e{number}")) for number in range(count)]
        for method in ("IsoC", "TIES", "SparseAverage"):
            memory[method] = largest(estimate_merge(Merged(experts, method))).peak
    return {"bytes": found, "memory": memory}


def show(report: dict[str, Any]) -> None:
    for name, kind in (("bytes", "bytes on disk"), ("memory", "memory of the merge, beside Python's own")):
        print(f"\n| {kind} | |\n|---|--:|")
        for row, size in report[name].items():
            print(f"| {row} | {bytes_text(size)} |")


if __name__ == "__main__":
    options = Parser(__doc__, "two LoRAs instead of eight").parse_args()
    output(options, report(2 if options.quick else 8), show)
