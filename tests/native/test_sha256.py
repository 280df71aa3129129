"""Digests of several tensors are those of hashlib, whatever their sizes, their number and their order."""

import hashlib

import pytest
import torch

from modular_experts.native.sha256 import sha256

EDGES = [0, 1, 55, 56, 63, 64, 65, 119, 120, 127, 128, 129, 5000]
"""Sizes about the padding of one block and of two."""


@pytest.mark.parametrize("sizes", [[], [3], EDGES, EDGES[::-1], [70_000, 3, 70_001, 64], [64] * 5])
def test_digests_are_those_of_hashlib(sizes: list[int]) -> None:
    content = (torch.arange(200_000) * 2654435761 // 65536 % 251).to(torch.uint8)
    tensors = [content[7 * place : 7 * place + size] for place, size in enumerate(sizes)]
    assert sha256(tensors) == [hashlib.sha256(bytes(one.tolist())).hexdigest() for one in tensors]


def test_numbers_are_hashed_by_their_bytes() -> None:
    values = torch.linspace(-1, 1, 999).view(27, 37)
    assert sha256([values, values.bfloat16()]) == [
        hashlib.sha256(values.numpy().tobytes()).hexdigest(),
        hashlib.sha256(values.bfloat16().view(torch.int16).numpy().tobytes()).hexdigest(),
    ]
