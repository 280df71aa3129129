"""The low-rank way to a spectrum gives what numpy gives for the dense matrix, and leaves noise out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from testbed.random_deltas import forms, random_delta, seeds, shapes

from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.methods.spectrum import as_delta, join, left_factor, nearest_isometry, spectrum

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def product(parts):
    return parts.left * parts.values @ parts.right


@given(shapes, seeds, forms)
def test_spectrum_is_that_of_the_dense_matrix(shape, seed, form):
    delta = random_delta(form, shape, seed)
    found, dense = spectrum(delta), delta.dense().double()
    torch.testing.assert_close(product(found), dense, rtol=1e-6, atol=1e-6)
    values = np.linalg.svd(dense.numpy(), compute_uv=False)[: found.count]
    torch.testing.assert_close(found.values, torch.from_numpy(values.copy()), **CLOSE)
    identity = torch.eye(found.count, dtype=torch.float64)
    torch.testing.assert_close(found.left.T @ found.left, identity, **CLOSE)
    torch.testing.assert_close(found.right @ found.right.T, identity, **CLOSE)


def test_rounding_to_float32_adds_no_direction():
    draw = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((80, 3), (3, 120)))
    assert spectrum(Dense((up @ down).float())).count == 3
    assert spectrum(Dense((up @ down).float() + 1e-3 * torch.randn(80, 120, generator=draw))).count == 80


def test_low_rank_factors_that_repeat_themselves_count_once():
    up, down = torch.randn(9, 2), torch.randn(2, 8)
    found = spectrum(LowRank(torch.cat([up, up], 1), torch.cat([down, down])))
    assert found.count == 2
    torch.testing.assert_close(product(found), 2 * up.double() @ down.double(), **CLOSE)


def test_top_directions_are_the_nearest_matrix_of_their_rank():
    dense = torch.diag(torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64))
    assert product(spectrum(Dense(dense)).top(2)).round(decimals=9).tolist() == [[0, 0, 0], [0, 5, 0], [0, 0, 3]]


@given(shapes, seeds, forms)
def test_left_factor_has_the_left_side_of_the_delta(shape, seed, form):
    delta = random_delta(form, shape, seed)
    factor, dense = left_factor(delta), delta.dense().double()
    torch.testing.assert_close(factor @ factor.T, dense @ dense.T, **CLOSE)
    assert factor.shape[1] <= (delta.rank if isinstance(delta, LowRank) else min(shape))


def test_nearest_isometry_is_orthonormal_and_nearer_than_others():
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 4, generator=draw, dtype=torch.float64)
    nearest = nearest_isometry(matrix)
    torch.testing.assert_close(nearest.T @ nearest, torch.eye(4, dtype=torch.float64), **CLOSE)
    for _ in range(50):
        other = torch.linalg.qr(nearest + 0.1 * torch.randn(7, 4, generator=draw, dtype=torch.float64)).Q
        signs = (other * nearest).sum(0).sign()
        assert (matrix - other * signs).norm() > (matrix - nearest).norm()


@pytest.mark.parametrize(("rank", "form"), [(0, Sparse), (2, LowRank), (3, Dense)])
def test_result_has_the_smaller_form_and_the_dtype_of_the_deltas(rank, form):
    half = Dense(torch.zeros(6, 6, dtype=torch.bfloat16))
    up, down = torch.ones(6, rank, dtype=torch.float64), torch.ones(rank, 6, dtype=torch.float64)
    made = as_delta(up, down, [half, Sparse.zero((6, 6))])
    assert isinstance(made, form)
    assert made.dense().double().eq(rank).all()
    assert rank == 0 or made.dtype == torch.bfloat16


def test_joined_spectra_sum_to_the_sum():
    deltas = [random_delta(form, (6, 9), 4) for form in ("Dense", "LowRank", "zero", "Sparse")]
    total = sum(delta.dense().double() for delta in deltas)
    torch.testing.assert_close(product(join([spectrum(delta) for delta in deltas])), total, **CLOSE)
