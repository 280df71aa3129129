"""The methods that merge directions: spectra, forms of the result, and the minimum of WUDI."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import assert_merged, factors_only
from testbed.random_deltas import forms, random_delta, seeds, shapes

import modular_experts.methods as ours
from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.methods.spectrum import as_delta, spectrum

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


@pytest.mark.parametrize(("rank", "form"), [(0, Sparse), (2, LowRank), (3, Dense)])
def test_result_has_the_smaller_form_and_the_dtype_of_the_deltas(rank, form):
    half = Dense(torch.zeros(6, 6, dtype=torch.bfloat16))
    up, down = torch.ones(6, rank, dtype=torch.float64), torch.ones(rank, 6, dtype=torch.float64)
    made = as_delta(up, down, [half, Sparse.zero((6, 6))])
    assert isinstance(made, form)
    assert made.dense().double().eq(rank).all()
    assert rank == 0 or made.dtype == torch.bfloat16


def draw(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def deltas_of(matrices):
    return [Dense(torch.from_numpy(matrix)) for matrix in matrices]


experts = st.lists(seeds, min_size=1, max_size=4, unique=True)


def test_directions_that_the_sum_lacks_are_left_out():
    lora = LowRank(torch.tensor([[3.0], [0.0], [4.0]]), torch.tensor([[0.0, 2.0, 0.0]]))
    for method in (ours.IsoC(), ours.IsoCTS()):
        torch.testing.assert_close(method.merge([lora, lora]).dense(), 2 * lora.dense())


def test_an_expert_within_the_common_space_gets_no_directions_made_of_rounding():
    left, right = (np.linalg.qr(draw((4, 4), seed))[0] for seed in range(2))
    matrices = [left @ np.diag(values) @ right for values in ([9.0, 0.0, 0.0, 0.0], [0.0, 5.0, 2.0, 1.0])]
    wanted = (9 + 5 + 2) / 3 * left @ np.diag([1.0, 1.0, 1.0, 0.0]) @ right
    assert_merged(ours.IsoCTS(common=0.5).merge(deltas_of(matrices)), wanted, atol=1e-9)


METHODS = [
    ours.TSVMerge(share=0.5, scale=0.7),
    ours.IsoC(scale=-0.5),
    ours.IsoCTS(common=0.3, scale=2.0),
    ours.KnOTS(ours.TaskArithmetic(0.5), scale=2.0),
    ours.KnOTS(ours.TIES()),
    ours.WUDI("roberta", solver="exact", scale=0.3),
    ours.WUDI(learning_rate=1e-2, steps=20),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


@pytest.mark.parametrize("method", [method for method in METHODS if not isinstance(method, ours.KnOTS)], ids=str)
def test_what_is_not_a_matrix_gets_the_scaled_mean(method):
    for shape in [(5,), (2, 3, 4)]:
        values = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
        assert_merged(method.merge([*map(Dense, values), Sparse.zero(shape)]), method.scale * sum(values) / 4)


@each_method
def test_stored_values_are_rounded_once(method):
    for dtype in (torch.float32, torch.bfloat16):
        deltas = [random_delta("Dense", (9, 9), seed, dtype=dtype) for seed in range(3)]
        exact = method.merge([delta.to(dtype=torch.float64) for delta in deltas])
        merged = method.merge(deltas)
        assert merged.dtype == dtype
        if isinstance(merged, Dense):
            assert torch.equal(merged.dense(), exact.dense().to(dtype))
        else:  # each factor is rounded
            assert (merged - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize(
    "method",
    [
        *(ours.TSVMerge(), ours.IsoC(), ours.IsoCTS(), ours.KnOTS(), ours.WUDI(solver="exact")),
        *(ours.ModelStock(), ours.SVC(ours.TaskArithmetic()), ours.Rescaled(ours.TSVMerge())),
        *(ours.SLERP(t=0.3), ours.NuSLERP(row_wise=True), ours.MultiSLERP(), ours.Karcher(max_iterations=2)),
    ],
    ids=str,
)
def test_low_rank_experts_are_never_made_dense(method):
    draw = torch.Generator().manual_seed(0)
    loras = [LowRank(torch.randn(40, 2, generator=draw), torch.randn(2, 50, generator=draw)) for _ in range(4)]
    counts_zeros = isinstance(method, ours.SLERP | ours.NuSLERP | ours.MultiSLERP | ours.Karcher)
    with factors_only():
        merged = method.merge([*loras, Sparse.zero((40, 50))][: 4 if counts_zeros else 5])
    assert isinstance(merged, LowRank)
    assert merged.rank <= 8
    expected = method.merge([Dense(lora.to(dtype=torch.float64).dense()) for lora in loras])
    assert_merged(merged, expected.dense(), rtol=1e-4, atol=1e-4)


matrix_shapes = st.sampled_from([(5, 7), (9, 4), (1, 6), (6, 1), (20, 8), (4, 30)])
powers = st.sampled_from([1.0, 2.0])


def loss(place, matrices, power):
    terms = [((place - t) @ t.T).square().sum() / t.norm() ** power for t in matrices]
    return torch.stack(terms).sum()


def gradient(place, matrices, power):
    place = place.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(place, matrices, power), place)
    return found


def wudi_experts(shape, numbers):
    return [random_delta("Dense" if seed % 2 else "LowRank", shape, seed) for seed in numbers]


@given(matrix_shapes, experts, powers)
def test_exact_is_a_minimum_and_the_smallest(shape, numbers, power):
    deltas = wudi_experts(shape, numbers)
    merged = ours.WUDI(power=power, solver="exact").merge(deltas).dense()
    matrices = [delta.dense() for delta in deltas]
    scale = max(matrix.norm().item() for matrix in matrices) ** (4 - power)
    assert gradient(merged, matrices, power).norm() < 1e-5 * scale  # convex: no slope, no lower place
    rows = torch.linalg.svd(torch.cat(matrices), full_matrices=False)
    inside = rows.Vh[1e-7 * rows.S[0] < rows.S]
    torch.testing.assert_close(merged @ inside.T @ inside, merged, rtol=1e-5, atol=1e-5 * merged.norm().item())


@pytest.mark.parametrize(
    ("preset", "settings"), [(None, (1.0, 1e-5, 300)), ("vit", (1.0, 1e-5, 300)), ("roberta", (2.0, 2e-5, 300))]
)
def test_presets_fill_what_is_left_open(preset, settings):
    method = ours.WUDI(preset)
    assert (method.power, method.learning_rate, method.steps) == settings
    assert ours.WUDI(preset, steps=7).steps == 7
    assert ours.WUDI(preset, steps=7).learning_rate == settings[1]
