"""The Triton program gives the dense gradient's kept tiles: run in Triton's interpreter, and compiled for two GPUs.

Triton reads `TRITON_INTERPRET` when it is imported, which another test may have done before. So copies of this process
import it anew: one checks every case with the variable set, and one translates the program for GPUs that are not there.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from testbed.forked import ended, forked
from testbed.kept_tiles import kept_tiles
from testbed.pairwise import pairwise
from torch import Tensor

from modular_experts.native import triton_tiles
from modular_experts.native.triton_tiles import SIZES, TritonTiles, token_splits

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, int] = (130, 70)
    tokens: int = 50
    size: int = 16
    dtype: str = "float32"
    kept: str = "few"
    splits: int = 1
    layout: str = "rows"

    def __str__(self) -> str:
        return " ".join(str(value) for value in dataclasses.astuple(self))


SHAPES, TOKENS, KINDS = [(17, 40), (64, 64), (130, 70)], [1, 50, 100], ["few", "all", "one", "empty row", "none"]
CASES = [
    *itertools.starmap(Case, pairwise(SHAPES, TOKENS, (16, 32, 64, 128))),
    *(Case(shape=shape, size=8) for shape in SHAPES),
    *(Case(shape=(50, 40), size=size, dtype=dtype) for size in SIZES for dtype in ("bfloat16", "float16")),
    *(Case(size=size, kept=kept) for size, kept in zip((16, 64, 16, 64, 64), KINDS, strict=True)),
    *(Case(shape=(40, 300), kept=kept) for kept in ("all", "empty row")),  # rows longer than a segment
    *(Case(layout=layout) for layout in ("columns", "expanded")),
    Case(tokens=0),
]
SPLIT = [
    Case(shape=(50, 40), tokens=150, size=size, dtype=dtype, splits=splits)
    for size, dtype in ((16, "float32"), (16, "bfloat16"), (64, "float32"))
    for splits in (1, 2, 3)
]


class Split(TritonTiles):
    """Splits the tokens as a case says, and remembers into how many parts they were.

    The last segment is made first: one that wrote beyond its own end would spoil tiles that are already there.
    """

    asked, made = 1, 0

    def __init__(self, units: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> None:
        super().__init__(units, shape, tile)
        self.segments = self.segments.flip(0)

    def splits(self, tokens: int) -> int:
        return self.asked

    def _launch(self, x: Tensor, grad: Tensor, partials: Tensor, split_tokens: int, chunk: int) -> None:
        self.made = partials.shape[0]
        partials.fill_(float("nan"))  # as memory that was not written may read
        super()._launch(x, grad, partials, split_tokens, chunk)


def _units(case: Case) -> list[int]:
    tall, wide = -(-case.shape[0] // case.size), -(-case.shape[1] // case.size)
    every = list(range(tall * wide))
    first_row_but_one = range(wide, 2 * wide) if tall > 1 else []
    return {
        "few": every[::3],
        "all": every,
        "one": [every[-1]],
        "empty row": [unit for unit in every if unit not in first_row_but_one],
        "none": [],
    }[case.kept]


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(case.tokens)
    x, grad = (torch.randn(case.tokens, width, generator=draw) for width in (case.shape[1], case.shape[0]))
    if case.layout == "columns":
        x, grad = x.T.contiguous().T, grad.T.contiguous().T
    if case.layout == "expanded":
        grad = grad[:1].expand(case.tokens, -1)
    return x.to(getattr(torch, case.dtype)), grad.to(getattr(torch, case.dtype))


def _found(case: Case) -> dict[str, Any]:
    """Return how far the program is from float64 on a case, and whether a second run gives the same bits."""
    units = torch.tensor(_units(case), dtype=torch.int32)
    kernel = Split(units, case.shape, (case.size, case.size))
    kernel.asked = case.splits
    x, grad = _inputs(case)
    dense = torch.einsum("to,ti->oi", grad.double(), x.double())
    found, wanted = kernel.gradient(kernel.saved(x), grad), kept_tiles(dense, kernel.tile, _units(case))
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    return {
        "error": (found - wanted).abs().max().item() if wanted.numel() else 0.0,
        "splits": kernel.made,
        "repeats": case in SPLIT and torch.equal(found, kernel.gradient(x, grad)),
    }


def _compiled(capability: int, dtype: str) -> str:
    """Return the assembly of the program for tiles of 16, translated for a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    program = triton_tiles.program()
    fixed = {"size": 16, "tiles": 16, "chunk": 32 if dtype == "bf16" else 16, "precision": "ieee", "widened": False}
    pointers = {"x": f"*{dtype}", "grad": f"*{dtype}", "partials": "*fp32", "segments": "*i32", "columns": "*i32"}
    signature = {name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in program.arg_names}
    place = program.arg_names.index
    aligned = {(place(name),): [["tt.divisibility", 16]] for name in (*pointers, "x_stride", "grad_stride", "inputs")}
    source = ASTSource(program, signature, {(place(name),): value for name, value in fixed.items()}, aligned)
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def _interpreted() -> dict[str, Any]:
    return {str(case): _found(case) for case in CASES + SPLIT}


def _translated() -> dict[str, Any]:
    return {f"{number} {dtype}": _compiled(number, dtype) for number in (80, 90) for dtype in ("bf16", "fp32")}


def _write(what: Callable[[], dict[str, Any]], place: Path) -> None:
    """Write what a function finds with a Triton of its own."""
    warnings.simplefilter("error")
    triton_tiles.program.cache_clear()
    # The compiled part of Triton can be loaded once.
    for name in [name for name in sys.modules if name.startswith("triton") and not name.startswith("triton._C")]:
        del sys.modules[name]
    place.write_text(json.dumps(what()))


@functools.cache
def _report(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a function finds in a copy of this process, once."""
    with tempfile.TemporaryDirectory() as place:
        found = Path(place, "found.json")
        variables = {"TRITON_CACHE_DIR": place, "TRITON_INTERPRET": str(int(what is _interpreted))}
        assert ended(forked(_write, what, found, **variables)) == 0
        return json.loads(found.read_text())


@with_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_dense_gradient_at_the_kept_tiles(case: Case) -> None:
    assert _report(_interpreted)[str(case)]["error"] < 5e-5


@with_triton
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_splits_of_the_tokens_add_up_to_the_same_gradient_every_time(case: Case) -> None:
    found = _report(_interpreted)[str(case)]
    assert found["splits"] == case.splits
    assert found["error"] < 5e-5
    assert found["repeats"]


@with_triton
@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_it_compiles_for_a_gpu_into_the_instructions_of_the_precision(capability, instruction) -> None:
    assembly = _report(_translated)[f"{capability} bf16"]
    assert instruction in assembly
    assert "cp.async.cg.shared.global" in assembly, "it must read 16 bytes at once"
    exact = _report(_translated)[f"{capability} fp32"]
    assert "fma.rn.f32" in exact
    assert "tf32" not in exact


@pytest.fixture
def restored_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("restored_precision")
@pytest.mark.parametrize(("allowed", "precision"), [(False, "ieee"), (True, "tf32")])
def test_float32_is_exact_unless_torch_allows_tf32(monkeypatch: pytest.MonkeyPatch, allowed, precision) -> None:
    launches: list[dict[str, Any]] = []
    program = {(1, 1): lambda *arguments, **settings: launches.append(settings)}
    monkeypatch.setattr(triton_tiles, "program", lambda: program)
    monkeypatch.setattr(triton_tiles, "interpreted", lambda: True)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    TritonTiles(torch.tensor([0]), (16, 16), (16, 16)).gradient(torch.zeros(1, 16), torch.zeros(1, 16))
    assert [settings["precision"] for settings in launches] == [precision]


@pytest.mark.parametrize(
    ("segments", "tokens", "kept_bytes", "parts"),
    [
        (528, 10**6, 1, 1),
        (100, 10**6, 1, 6),
        (1, 1024, 1, 4),
        (1, 1, 1, 1),
        (0, 0, 0, 1),
        (1, 10**6, 2**24, 2),
        (1, 10**6, 2**30, 1),
    ],
)
def test_tokens_are_split_while_the_gpu_has_room_for_more_programs_and_for_partial_sums(
    segments, tokens, kept_bytes, parts
) -> None:
    assert token_splits(segments, tokens, kept_bytes, processors=132) == parts


@pytest.mark.parametrize("tile", [(24, 24), (4, 4), (256, 256), (16, 32)])
def test_tiles_that_noprogram_serves_are_refused(tile: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"serves square tiles of 8, .* or 128, not {tile[0]} x {tile[1]}; set"):
        TritonTiles(torch.tensor([0]), (512, 512), tile)


def test_float64_is_refused_and_without_triton_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    make = triton_tiles.program.__wrapped__
    monkeypatch.setattr(triton_tiles, "program", lambda: None)
    kernel = TritonTiles(torch.tensor([0]), (16, 16), (16, 16))
    with pytest.raises(ValueError, match=r"not in torch\.float64; use auto"):
        kernel.gradient(torch.zeros(1, 16).double(), torch.zeros(1, 16).double())
    monkeypatch.setattr(triton_tiles, "program", make)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="needs the package triton: pip install triton, or use auto"):
        TritonTiles(torch.tensor([0]), (16, 16), (16, 16))
