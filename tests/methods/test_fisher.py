"""Fisher merging against its formula entry by entry in float64, and its limits."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight

from modular_experts.methods import Fisher
from modular_experts.methods.method import Context, DataStatistic

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def informations(deltas, seed=0, spread=3.0):
    """Random Fisher informations over several orders of magnitude, as in a trained model, in float32."""
    draw = torch.Generator().manual_seed(seed)
    logs = [spread * torch.randn(deltas[0].shape, generator=draw) - 9 for _ in deltas]
    return [DataStatistic(log.exp(), norm=2.0 + number) for number, log in enumerate(logs)]


def merge(method, deltas, statistics):
    return method.merge(deltas, Context("w", statistics))


def formula(deltas, statistics, scale=1.0, normalise=True, floor=1e-6):
    """The weighted mean of each entry, one entry after the other."""
    dense = [delta.dense().double().reshape(-1).tolist() for delta in deltas]
    weights = [
        [value / one.norm if normalise else value for value in one.values.double().reshape(-1).tolist()]
        for one in statistics
    ]
    added = floor * sum(map(sum, weights)) / sum(map(len, weights))
    merged = []
    for entry in range(len(dense[0])):
        each = [row[entry] + added for row in weights]
        merged.append(scale * sum(w * row[entry] for w, row in zip(each, dense, strict=True)) / sum(each))
    return torch.tensor(merged, dtype=torch.float64).view(deltas[0].shape)


@given(deltas_of_one_weight(), st.integers(0, 99), st.floats(-2, 2), st.booleans(), st.floats(1e-8, 10))
def test_fisher_equals_the_formula(deltas, seed, scale, normalise, floor):
    statistics = informations(deltas, seed)
    merged = merge(Fisher(scale, normalise, floor), deltas, statistics)
    torch.testing.assert_close(merged.dense().double(), formula(deltas, statistics, scale, normalise, floor), **CLOSE)
