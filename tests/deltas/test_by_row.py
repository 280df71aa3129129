"""A delta with a coefficient for each row is `diag(c) @ delta`, whatever its form, and its gradient is row by row."""

import pytest
import torch
from testbed.random_deltas import random_delta

from modular_experts.deltas import Dense, Sparse
from modular_experts.deltas.algebra import dot_by_row, scale_rows

CASES = [
    *(random_delta(form, (7, 10), 3) for form in ("Dense", "LowRank", "Sparse")),
    *(random_delta("BlockSparse", (7, 10), 3, tile=tile) for tile in ((3, 3), (1, 10), (7, 1), (7, 5))),
    random_delta("Sparse", (7, 10), 3, share=0.02),  # most rows have no entry
    Dense(torch.randn(5, dtype=torch.float64)),
    Dense(torch.tensor(2.0, dtype=torch.float64)),
    Sparse(torch.tensor([1, 4], dtype=torch.int32), torch.randn(2, dtype=torch.float64), torch.Size([5])),
]


@pytest.mark.parametrize("delta", CASES, ids=repr)
def test_each_row_is_scaled_and_measured_as_in_the_dense_form(delta) -> None:
    dense, rows = delta.dense(), delta.shape[0] if delta.shape else 1
    factors, tensor = torch.randn(rows, dtype=torch.float64), torch.randn(delta.shape, dtype=torch.float64)
    scaled = scale_rows(delta, factors)
    assert type(scaled) is type(delta)
    exact = (torch.diag(factors) @ dense.view(rows, -1)).view(delta.shape)
    torch.testing.assert_close(scaled.dense(), exact, rtol=1e-13, atol=1e-13)
    found = dot_by_row(tensor, delta)
    torch.testing.assert_close(found, (tensor * dense).view(rows, -1).sum(1), rtol=1e-12, atol=1e-12)
    if tensor.dim() == 2:
        torch.testing.assert_close(dot_by_row(tensor.T.contiguous().T, delta), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["Dense", "LowRank", "Sparse", "BlockSparse"])
def test_half_precision_is_computed_in_float32(form) -> None:
    delta = random_delta(form, (7, 10), 3, torch.bfloat16)
    factors, tensor = torch.rand(7, dtype=torch.float64), torch.randn(7, 10, dtype=torch.bfloat16)
    scaled, found = scale_rows(delta, factors), dot_by_row(tensor, delta)
    assert (scaled.dtype, found.dtype) == (torch.float32, torch.float32)
    wide = delta.to(dtype=torch.float64).dense()
    torch.testing.assert_close(scaled.to(dtype=torch.float64).dense(), factors[:, None] * wide, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.double(), (tensor.double() * wide).sum(1), rtol=1e-2, atol=1e-2)
