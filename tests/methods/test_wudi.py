"""WUDI equals the loss as printed, with Adam written out, and the minimum by its conditions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import random_delta, seeds

from modular_experts.deltas import Dense
from modular_experts.methods import WUDI

experts = st.lists(seeds, min_size=1, max_size=3, unique=True)
matrix_shapes = st.sampled_from([(5, 7), (9, 4), (1, 6), (6, 1), (20, 8), (4, 30)])
powers = st.sampled_from([1.0, 2.0])


def loss(place, matrices, power):
    terms = [((place - t) @ t.T).square().sum() / t.norm() ** power for t in matrices]
    return torch.stack(terms).sum()


def gradient(place, matrices, power):
    place = place.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(place, matrices, power), place)
    return found


def adam(matrices, power, learning_rate, steps):
    place = sum(matrices)
    mean = square = torch.zeros_like(place)
    for step in range(1, steps + 1):
        slope = gradient(place, matrices, power)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        place = place - learning_rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return place


def draw(shape, numbers):
    return [random_delta("Dense" if seed % 2 else "LowRank", shape, seed) for seed in numbers]


@given(matrix_shapes, st.lists(seeds, min_size=2, max_size=3, unique=True), powers)
def test_adam_descends_the_printed_loss_from_the_sum(shape, numbers, power):
    deltas = draw(shape, numbers)
    merged = WUDI(power=power, learning_rate=1e-2, steps=15).merge(deltas)
    expected = adam([delta.dense() for delta in deltas], power, 1e-2, 15)
    torch.testing.assert_close(merged.dense(), expected, rtol=1e-5, atol=1e-6)


@given(matrix_shapes, experts, powers)
def test_exact_is_a_minimum_and_the_smallest(shape, numbers, power):
    deltas = draw(shape, numbers)
    merged = WUDI(power=power, solver="exact").merge(deltas).dense()
    matrices = [delta.dense() for delta in deltas]
    scale = max(matrix.norm().item() for matrix in matrices) ** (4 - power)
    assert gradient(merged, matrices, power).norm() < 1e-5 * scale  # convex: no slope, no lower place
    rows = torch.linalg.svd(torch.cat(matrices), full_matrices=False)
    inside = rows.Vh[1e-7 * rows.S[0] < rows.S]
    torch.testing.assert_close(merged @ inside.T @ inside, merged, rtol=1e-5, atol=1e-5 * merged.norm().item())


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_exact_is_the_formula_of_the_docstring(power):
    matrices = [random_delta("Dense", (12, 6), seed).dense() for seed in range(3)]
    weights = [matrix.T @ matrix / matrix.norm() ** power for matrix in matrices]
    formula = sum(t @ a for t, a in zip(matrices, weights, strict=True)) @ torch.linalg.pinv(sum(weights))
    torch.testing.assert_close(WUDI(power=power, solver="exact").merge([*map(Dense, matrices)]).dense(), formula)


@pytest.mark.parametrize(
    ("preset", "settings"), [(None, (1.0, 1e-5, 300)), ("vit", (1.0, 1e-5, 300)), ("roberta", (2.0, 2e-5, 300))]
)
def test_presets_fill_what_is_left_open(preset, settings):
    method = WUDI(preset)
    assert (method.power, method.learning_rate, method.steps) == settings
    assert WUDI(preset, steps=7).steps == 7
    assert WUDI(preset, steps=7).learning_rate == settings[1]
