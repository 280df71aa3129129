"""What a sparse delta takes on disk, and what reading it costs: bytes beside the information in it, time beside int32.

Sizes are bytes per kept entry or tile. The floor is what a choice of k of n places holds, log2 C(n, k) bits, and 32
bits per value; a clustered choice holds less, which is left out. Values and supports are random: `clustered` draws runs
of 256 places that are likely together. CSR (16-bit columns, 32-bit rows) is a way not taken; a Rice code stands beside
encoded values only.

Times are CPU times on one thread, of a file in the system's cache, hashes and checks included: the same delta as it is
stored and with its places as int32, in turn, in an order drawn anew for each round. The numbers are ratios of medians.

Experts with encoded values are compared with the same ones in float32, in the same way: eight experts of one block of
SmolLM2's shape, entries and tiles at 5 %, LoRA of rank 16. One is read (opened, and all deltas), three are merged by
SelfRegMean, and eight are put behind gates, a row of 64 tokens each, and pass forward.

    python benchmarks/storage.py [--json FILE] [--quick]      three minutes; --quick: in small, to see that it runs
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measuring import Parser, machine, medians
from merge_report import print_table
from rich.console import Console
from routing_cost import RECORD, RandomExpert
from torch import Tensor, nn

from modular_experts.deltas import BlockSparse, Delta, Sparse
from modular_experts.deltas.tiles import tile_grid
from modular_experts.injection.routed import routed
from modular_experts.library import StoredExpert, open_expert, open_experts, write_expert
from modular_experts.library.encoded import VALUE_TYPES
from modular_experts.merger.merged import Merged
from modular_experts.methods import SelfRegMean

Shape = tuple[int, int]
SHAPE, TILE = (1536, 576), 16
SHARES = [0.0005, 0.002, 0.01, 0.05, 0.1, 0.2, 0.5, 0.65, 1.0]
TIMED = [(0.01, ["random"]), (0.05, ["random", "clustered"]), (0.15, ["random"]), (0.5, ["random", "clustered"])]
SHAPES = [(576, 576), (1536, 576), (8192, 3072)]
VALUE = 4  # bytes
BLOCK = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576), "down": (576, 1536)}
BLOCK["up"] = BLOCK["gate"]
EXPERTS, MERGED, TOKENS = 8, 3, 64


def support(places: int, share: float, kind: str) -> Tensor:
    """Return the kept places `(k,)`, sorted."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(places, generator=draw)
    if kind == "clustered":
        scores += torch.randn(places // 256 + 1, generator=draw).repeat_interleave(256)[:places]
    return scores.topk(max(1, round(share * places)), sorted=False).indices.sort().values.int()


def entries(shape: Shape, share: float, kind: str) -> Sparse:
    """Return a delta of single entries."""
    places = support(math.prod(shape), share, kind)
    return Sparse(places, torch.randn(len(places)), torch.Size(shape))


def tiles(shape: Shape, share: float, kind: str) -> BlockSparse:
    """Return a delta of square tiles."""
    blocks = support(math.prod(tile_grid(shape, (TILE, TILE))), share, kind)
    return BlockSparse(blocks, torch.randn(len(blocks), TILE, TILE), torch.Size(shape))


def write_as_int32(path: Path, deltas: Mapping[str, Delta]) -> None:
    """Write an expert as it was before there were encodings."""
    with mock.patch("modular_experts.library.packing.encode", lambda numbers, limit, plain, _: {plain: numbers}):
        write_expert(path, deltas, RECORD, overwrite=True)


def floor_bytes(places: int, kept: int) -> float:
    """Return the bytes of information in a choice of `kept` of `places`."""
    chosen = math.lgamma(places + 1) - math.lgamma(kept + 1) - math.lgamma(places - kept + 1)
    return chosen / math.log(2) / 8


def candidates(kept: Tensor, rows: int, limit: int) -> dict[str, float]:
    """Return the bytes of each way to store kept places, by arithmetic."""
    distances = kept.diff(prepend=kept.new_tensor([-1])) - 1
    return {
        "int32": 4 * len(kept),
        "CSR": 2 * len(kept) + 4 * (rows + 1),
        "gaps": int((distances // 255 + 1).sum()),
        "mask": math.ceil(limit / 8),
        "Rice": min(
            1 + low * -(-len(kept) // 8) - (-(len(kept) + int((distances >> low).sum())) // 8) for low in range(9)
        ),
    }


def size_row(delta: Sparse | BlockSparse, stored: StoredExpert, name: str, share: float, kind: str) -> dict[str, Any]:
    """Return bytes per kept place of each way, and of the file over the floor."""
    kept, tile = (delta.indices, (1, 1)) if isinstance(delta, Sparse) else (delta.blocks, delta.tile)
    rows, columns = tile_grid(delta.shape, tile)
    count, values = len(kept), VALUE * delta.values.numel()
    ways = {way: size / count for way, size in candidates(kept, rows, rows * columns).items()}
    size, floor = stored.stored_bytes()[name], floor_bytes(rows * columns, count)
    row = {"name": name, "share": share, "support": kind, "floor": floor / count, **ways}
    row |= {"stored": (size - values) / count, "stored_over_floor": size / (values + floor)}
    return row | {"int32_over_floor": (4 * count + values) / (values + floor), "bytes_per_value": size / values * VALUE}


def sizes(folder: Path, shape: Shape) -> list[dict[str, Any]]:
    """Return a row for each share, support and unit of a weight."""
    kinds = [(share, kind) for share in SHARES for kind in ("random", "clustered") if share < 1 or kind == "random"]
    units: dict[str, Callable[..., Sparse | BlockSparse]] = {"entries": entries, f"tiles of {TILE}": tiles}
    rows = []
    for unit, make in units.items():
        for share, kind in kinds:
            if unit == "entries" or share >= 0.01:
                delta, name = make(shape, share, kind), f"{unit}, {share:.4g}, {kind}"
                write_expert(folder / "size", {name: delta}, RECORD, overwrite=True)
                rows.append(size_row(delta, open_expert(folder / "size"), name, share, kind))
    return rows


def beside_others(rows: list[dict[str, Any]], shape: Shape) -> dict[str, float]:
    """Return bytes per trained number of this package's files (measured) and of others' (arithmetic), at 5 %."""
    kept = {row["name"]: row for row in rows if row["share"] == 0.05 and row["support"] == "random"}
    share = round(0.05 * math.prod(shape)) / math.prod(shape)
    found = {name.split(", ")[0]: row["bytes_per_value"] for name, row in kept.items()}
    found["entries, int32"] = VALUE + 4
    found["LoRA of as many numbers, float32 *"] = VALUE
    found["the whole weight, bfloat16 *"] = 2 / share
    found["mttl's: dense delta and mask, float32 *"] = 8 / share
    return found


def reading(path: Path, before: int, rounds: int) -> Callable[[], Any]:
    """Return what reads an expert, in each round one that was opened before and read so many times."""
    opened = [open_expert(path) for _ in range(rounds + 1)]
    for expert in opened * before:
        expert["w"]
    return lambda: opened.pop()["w"]


def time_row(folder: Path, delta: Delta, rounds: int) -> dict[str, float]:
    """Return the time to read a delta, checked and again, over that of int32, and over a copy in memory."""
    write_expert(folder / "stored", {"w": delta}, RECORD, overwrite=True)
    write_as_int32(folder / "int32", {"w": delta})
    calls = {
        f"{way} {before}": reading(folder / way, before, rounds) for way in ("stored", "int32") for before in (0, 1)
    }
    calls["copy"] = lambda: [tensor.clone() for tensor in delta.tensors().values()]
    median = medians(calls, rounds)
    return {
        "first_over_int32": median["stored 0"] / median["int32 0"],
        "first_over_copy": median["stored 0"] / median["copy"],
        "int32_first_over_copy": median["int32 0"] / median["copy"],
        "again_over_first": median["stored 1"] / median["stored 0"],
        "again_over_copy": median["stored 1"] / median["copy"],
    }


def times(folder: Path, shapes: list[Shape], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each weight, share and support; the largest weight at the shares of sparse experts only."""
    rows = []
    for shape in shapes:
        for share, kinds in TIMED if math.prod(shape) < 10**7 else TIMED[:2]:
            for kind in kinds:
                row = {"name": f"{shape[0]} x {shape[1]}, {share:g}, {kind}", "shape": shape, "share": share}
                rows.append(row | {"support": kind} | time_row(folder, entries(shape, share, kind), rounds))
    return rows


class Layers(nn.Module):
    """The projections of a transformer block, each with an input of its own."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        super().__init__()
        for name, (rows, columns) in shapes.items():
            self.add_module(f"{name}_proj", nn.Linear(columns, rows, bias=False))

    def forward(self, inputs: Mapping[int, Tensor]) -> None:
        for weight, layer in zip(self.parameters(), self.children(), strict=True):
            layer(inputs[weight.shape[1]])


def pass_forward(model: nn.Module, folders: list[Path], inputs: Mapping[int, Tensor]) -> None:
    """Open experts, put each behind a row of its own, and pass the rows forward."""
    with routed(model, folders, rows=range(len(folders)), check=False):
        model(inputs)


def encoded(folder: Path, quick: bool, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each kind of expert and encoding: bytes, and times over those of float32."""
    model = Layers({"w": (96, 64)} if quick else BLOCK)
    widths = {weight.shape[1] for weight in model.parameters()}
    inputs = {width: torch.randn(EXPERTS, TOKENS, width) for width in widths}
    rows = []
    for kind in ("entries", "tiles", "LoRA"):
        calls: dict[str, Callable[[], Any]] = {}
        size = {}
        for encoding in VALUE_TYPES:
            folders = [folder / f"{kind}-{encoding}-{number}" for number in range(EXPERTS)]
            for number, path in enumerate(folders):
                write_expert(path, RandomExpert(model, kind, number), RECORD, overwrite=True, encoding=encoding)
            size[encoding] = sum(open_expert(folders[0]).stored_bytes().values())
            calls[f"read {encoding}"] = partial(lambda path: list(open_expert(path).values()), folders[0])
            merged = folders[:MERGED]
            calls[f"merge {encoding}"] = partial(
                lambda paths: list(Merged(open_experts(paths), SelfRegMean()).values()), merged
            )
            calls[f"route {encoding}"] = partial(pass_forward, model, folders, inputs)
        with torch.no_grad():
            median = medians(calls, rounds)
        for encoding in VALUE_TYPES[1:]:
            row = {"name": f"{kind}, {encoding}", "bytes": size[encoding] / size["float32"]}
            works = ("read", "merge", "route")
            rows.append(row | {work: median[f"{work} {encoding}"] / median[f"{work} float32"] for work in works})
    return rows


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=140)
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    ways = ["floor", "int32", "CSR", "gaps", "mask", "Rice", "stored"]
    ratios = {"stored_over_floor": "file/floor", "int32_over_floor": "int32 file/floor"}
    title = (
        f"{report['shape'][0]} x {report['shape'][1]}: bytes per kept place, without its values; and with them, ratios"
    )
    print_table(console, title, report["sizes"], {way: way for way in ways} | ratios)
    others = [{"name": name, "bytes": size} for name, size in report["others"].items()]
    print_table(console, "At 5 %: bytes per trained number (* is arithmetic)", others, {"bytes": "bytes"})
    columns = {"first_over_int32": "read/int32's", "first_over_copy": "read/copy"}
    columns |= {"int32_first_over_copy": "int32's/copy"}
    columns |= {"again_over_first": "again/read", "again_over_copy": "again/copy"}
    print_table(console, "Times, as ratios: first read, read again, copy in memory", report["times"], columns)
    columns = {name: name for name in ("bytes", "read", "merge", "route")}
    print_table(console, "Encoded values over float32: bytes, and CPU times", report["encoded"], columns)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to a file, too")
    parser.add_argument("--quick", action="store_true", help="a small weight, at which the times mean nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape, shapes, rounds = ((96, 64), [(96, 64)], 2) if options.quick else (SHAPE, SHAPES, 9)
    with tempfile.TemporaryDirectory() as folder:
        found = sizes(Path(folder), shape)
        report = {"machine": machine(), "shape": shape, "sizes": found, "others": beside_others(found, shape)}
        report["times"] = times(Path(folder), shapes, rounds)
        report["encoded"] = encoded(Path(folder), options.quick, rounds)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)


if __name__ == "__main__":
    main()
