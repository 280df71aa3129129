"""Inner products, coefficients of rows and sums of task vectors against dense float64 tensors."""

import numpy
import pytest
import torch
from hypothesis import given
from testbed.random_deltas import FORMS, Held, deltas_of_one_weight, random_delta

from modular_experts.deltas import Dense, LowRank, Sparse, add
from modular_experts.deltas.algebra import dot_by_row, inner, inner_by_row, scale_rows, truncated_svd

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@given(deltas_of_one_weight(least=2, most=2))
def test_inner_product_is_the_sum_of_products(deltas):
    products = deltas[0].dense().double() * deltas[1].dense().double()
    assert inner(*deltas) == pytest.approx(products.sum().item(), rel=1e-11, abs=1e-11)
    torch.testing.assert_close(inner_by_row(*deltas), products.sum(1), **CLOSE)


@pytest.mark.parametrize("one", FORMS)
def test_every_pair_of_forms_has_one(one):
    for other in FORMS:
        pair = [random_delta(form, (7, 10), seed, torch.float32) for seed, form in enumerate((one, other), start=1)]
        products = (pair[0].to(dtype=torch.float64).dense() * pair[1].to(dtype=torch.float64).dense()).sum(1)
        torch.testing.assert_close(inner_by_row(*pair), products, **CLOSE)


def test_nearly_orthogonal_deltas_keep_their_digits():
    one = Dense(torch.tensor([[1e8, 1.0, 0.0]], dtype=torch.float64))
    other = Dense(torch.tensor([[0.0, 1e-8, 1e8]], dtype=torch.float64))
    assert inner(one, other) == 1e-8  # by norms of sums: nothing but rounding errors of about 1


def test_sparse_and_low_rank_are_never_made_dense(monkeypatch):
    forms = ["LowRank", "LowRank", "Sparse", "Sparse", "BlockSparse"]
    deltas = [random_delta(form, (9, 12), seed) for seed, form in enumerate(forms)]
    dense = [delta.dense() for delta in deltas]
    for form in (LowRank, Sparse):
        monkeypatch.setattr(form, "dense", None)
    for i, one in enumerate(deltas):
        for j, other in enumerate(deltas):
            assert inner(one, other) == pytest.approx((dense[i] * dense[j]).sum().item(), rel=1e-11, abs=1e-11)


def test_a_vector_is_one_row_and_a_weight_of_more_dimensions_has_one_for_each_of_the_first():
    one = Dense(torch.tensor([1.0, -2.0, 3.0]))
    other = Sparse(torch.tensor([1]), torch.tensor([-4.0]), torch.Size([3]))
    assert inner_by_row(one, other).tolist() == [8.0]
    assert inner_by_row(one, one).tolist() == [14.0]
    assert inner_by_row(other, Sparse.zero((3,))).tolist() == [0.0]
    values = torch.arange(12.0).view(2, 3, 2)
    indices = torch.tensor([0, 5, 6, 11])
    sparse = Sparse(indices, torch.ones(4), torch.Size((2, 3, 2)))
    assert inner_by_row(Dense(values), sparse).tolist() == [5.0, 17.0]


@pytest.mark.parametrize(("form", "shape"), [("Dense", (12, 20)), ("Sparse", (20, 12)), ("LowRank", (20, 12))])
def test_truncated_svd_is_the_nearest_delta_of_a_rank(form, shape):
    for rank in (1, 3, 8):
        delta = random_delta(form, shape, 5, torch.float32)
        if form == "LowRank":
            delta = add([random_delta(form, shape, seed, torch.float32) for seed in (1, 3, 5)])
        product, lost = truncated_svd(delta, rank)
        exact = delta.up.double() @ delta.down.double() if form == "LowRank" else delta.dense().double()
        left, values, right = numpy.linalg.svd(exact.numpy(), full_matrices=False)
        nearest = torch.from_numpy(left[:, :rank] * values[:rank] @ right[:rank])
        assert product.rank <= rank
        torch.testing.assert_close(product.dense().double(), nearest, rtol=0, atol=1e-5)
        assert lost == pytest.approx((values[rank:] ** 2).sum(), rel=1e-9, abs=1e-9)


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


def test_arithmetic_is_lazy_and_weight_by_weight() -> None:
    one = Held({"a": random_delta("Sparse", (4, 5), 1), "b": random_delta("LowRank", (4, 5), 2)})
    two = Held({"b": random_delta("Dense", (4, 5), 3), "c": random_delta("BlockSparse", (4, 5), 4)})
    found = 0.5 * one - two * 2 + -one
    assert list(found) == ["a", "b", "c"]
    assert repr(0.5 * (one + two)) == "Scaled(0.5 * (Held + Held))"
    assert found.shapes()["c"] == (4, 5)
    assert "a" in found
    assert one.asked == two.asked == 0
    torch.testing.assert_close(found["a"].dense(), -0.5 * one["a"].dense())
    torch.testing.assert_close(found["b"].dense(), -0.5 * one["b"].dense() - 2 * two["b"].dense())
    torch.testing.assert_close(found["c"].dense(), -2 * two["c"].dense())
    wide, tall = (Held({"a": random_delta("Dense", shape, 1)}) for shape in ((2, 3), (3, 2)))
    with pytest.raises(ValueError, match=r"disagree on the shape of a: \(2, 3\) and \(3, 2\)"):
        wide + tall
