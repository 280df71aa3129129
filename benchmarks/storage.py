"""What a sparse delta takes on disk beside the information in it, and what experts with encoded values cost.

Sizes are bytes per kept entry or tile. The floor is what a choice of k of n places holds, log2 C(n, k) bits, and 32
bits per value. Values and supports are random. CSR (16-bit columns, 32-bit rows) is a way not taken; a Rice code stands
beside encoded values only.

Experts with encoded values are compared with the same ones in float32: eight experts of one block of SmolLM2's shape,
entries and tiles at 5 %, LoRA of rank 16. One is read (opened, and all deltas, with hashes and checks), three are
merged by SelfRegMean, and eight are put behind gates, a row of 64 tokens each, and pass forward. They take turns on one
thread, in an order drawn anew for each round; the numbers are ratios of medians of CPU time.

    python benchmarks/storage.py [--json FILE] [--quick]      three minutes; --quick: in small, to see that it runs
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Parser, medians, output, print_machine, print_table
from routing_cost import RECORD, RandomExpert
from torch import Tensor, nn

from modular_experts.deltas import BlockSparse, Sparse
from modular_experts.deltas.tiles import tile_grid
from modular_experts.injection.routed import routed
from modular_experts.library import StoredExpert, open_expert, open_experts, write_expert
from modular_experts.library.encoded import VALUE_TYPES
from modular_experts.merging.merged import Merged
from modular_experts.methods import SelfRegMean

Shape = tuple[int, int]
SHAPE, TILE = (1536, 576), 16
SHARES = [0.0005, 0.002, 0.01, 0.05, 0.1, 0.2, 0.5, 0.65, 1.0]
VALUE = 4  # bytes
BLOCK = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576), "down": (576, 1536)}
BLOCK["up"] = BLOCK["gate"]
EXPERTS, MERGED, TOKENS = 8, 3, 64


def support(places: int, share: float) -> Tensor:
    """Return the kept places `(k,)`, sorted."""
    scores = torch.rand(places, generator=torch.Generator().manual_seed(0))
    return scores.topk(max(1, round(share * places)), sorted=False).indices.sort().values.int()


def entries(shape: Shape, share: float) -> Sparse:
    """Return a delta of single entries."""
    places = support(math.prod(shape), share)
    return Sparse(places, torch.randn(len(places)), torch.Size(shape))


def tiles(shape: Shape, share: float) -> BlockSparse:
    """Return a delta of square tiles."""
    blocks = support(math.prod(tile_grid(shape, (TILE, TILE))), share)
    return BlockSparse(blocks, torch.randn(len(blocks), TILE, TILE), torch.Size(shape))


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


def size_row(delta: Sparse | BlockSparse, stored: StoredExpert, name: str, share: float) -> dict[str, Any]:
    """Return bytes per kept place of each way, and of the file over the floor."""
    kept, tile = (delta.indices, (1, 1)) if isinstance(delta, Sparse) else (delta.blocks, delta.tile)
    rows, columns = tile_grid(delta.shape, tile)
    count, values = len(kept), VALUE * delta.values.numel()
    ways = {way: size / count for way, size in candidates(kept, rows, rows * columns).items()}
    size, floor = stored.stored_bytes()[name], floor_bytes(rows * columns, count)
    row = {"name": name, "share": share, "floor": floor / count, **ways}
    row |= {"stored": (size - values) / count, "stored_over_floor": size / (values + floor)}
    return row | {"int32_over_floor": (4 * count + values) / (values + floor)}


def sizes(folder: Path, shape: Shape) -> list[dict[str, Any]]:
    """Return a row for each share and unit of a weight."""
    units: dict[str, Callable[..., Sparse | BlockSparse]] = {"entries": entries, f"tiles of {TILE}": tiles}
    rows = []
    for unit, make in units.items():
        for share in SHARES:
            if unit == "entries" or share >= 0.01:
                delta, name = make(shape, share), f"{unit}, {share:.4g}"
                write_expert(folder / "size", {name: delta}, RECORD, overwrite=True)
                rows.append(size_row(delta, open_expert(folder / "size"), name, share))
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
    print_machine(report)
    ways = ["floor", "int32", "CSR", "gaps", "mask", "Rice", "stored"]
    ratios = {"stored_over_floor": "file/floor", "int32_over_floor": "int32 file/floor"}
    title = "{} x {}: bytes per kept place, without its values; and with them, ratios".format(*report["shape"])
    print_table(title, report["sizes"], {way: way for way in ways} | ratios)
    columns = {name: name for name in ("bytes", "read", "merge", "route")}
    print_table("Encoded values over float32: bytes, and CPU times", report["encoded"], columns)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to a file, too")
    parser.add_argument("--quick", action="store_true", help="a small weight, at which the times mean nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape, rounds = ((96, 64), 2) if options.quick else (SHAPE, 9)
    with tempfile.TemporaryDirectory() as folder:
        report = {"shape": shape, "sizes": sizes(Path(folder), shape)}
        report["encoded"] = encoded(Path(folder), options.quick, rounds)
    output(options, report, show)


if __name__ == "__main__":
    main()
