"""A merge gives the bytes that it has always given, whichever passes compute it."""

import pytest
import torch

from modular_experts import merge
from modular_experts.deltas import Sparse
from modular_experts.library import make_record, write_expert
from modular_experts.methods import TIES, Average, MergeMethod, TaskArithmetic

SHAPE = torch.Size((300, 200))
RECORD = make_record("SparseExpert", {"id": "base", "revision": None, "fingerprint": "f" * 64})


def _expert(number: int) -> Sparse:
    """Return single entries with values of both signs and many sizes, from whole numbers alone."""
    places = torch.arange(number, SHAPE.numel(), 3 + 4 * number, dtype=torch.int32)
    values = ((places.long() * 7919 + number * 104729) % 2003 - 1001).float() / (1 + number)
    return Sparse(places, values, SHAPE)


@pytest.mark.parametrize(
    ("method", "content"),
    [
        (Average(), "6aaa72caa84a277128d505880119780716e5fcded85e894d5218b71646bcbb3c"),
        (
            TaskArithmetic(weights=[0.3, -1.0, 1 / 3, 0.7]),
            "532dbcb07320ce2e0e88f3f7dd0ea6f4c44956112c430e880c96f1fd1454b80c",
        ),
        (TIES(keep=0.02), "662ee402167675974c0db5fc0a34af79f74d7e8d8df1c9145f5dc18ff6f41ebf"),
    ],
    ids=["average", "weighted", "ties"],
)
def test_the_merged_bytes_are_those_of_the_first_release(method: MergeMethod, content: str, tmp_path) -> None:
    for number in range(4):
        write_expert(tmp_path / f"e{number}", {"w": _expert(number), "v": _expert(number + 1)}, RECORD)
    merged = merge([tmp_path / f"e{number}" for number in range(4)], method, tmp_path / "merged")
    assert merged.content_hash == content
