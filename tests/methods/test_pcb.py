"""PCB against a reading of the paper entry by entry, and what it does to copies, zeros and forms."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight

from modular_experts.methods.pcb import PCB

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def norm(values):
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / math.fsum(powers) for power in powers]


def pcb(deltas, keep=0.1, scale=1.0):
    experts = [delta.dense().double().reshape(-1).tolist() for delta in deltas]
    experts = [expert for expert in experts if any(expert)]
    size, total, weight = deltas[0].shape.numel(), [0.0] * deltas[0].shape.numel(), [0.0] * deltas[0].shape.numel()
    for expert in experts:
        intra = softmax([len(experts) * value for value in norm([value**2 for value in expert])])
        inter = [0.0] * size
        for other in experts:
            shared = softmax(norm([one * two for one, two in zip(expert, other, strict=True)]))
            inter = [before + now for before, now in zip(inter, shared, strict=True)]
        score = [one * two for one, two in zip(intra, inter, strict=True)]
        least = sorted(score, reverse=True)[max(1, int(keep * size)) - 1]
        for entry in range(size):
            if score[entry] >= least * (1 - 1e-9):  # entries that tie but for rounding
                total[entry] += score[entry] * expert[entry]
                weight[entry] += score[entry]
    merged = [scale * top / bottom if bottom else 0.0 for top, bottom in zip(total, weight, strict=True)]
    return torch.tensor(merged, dtype=torch.float64).view(deltas[0].shape)


@given(deltas_of_one_weight(of=["Dense", "LowRank", "zero"]), st.floats(0.05, 1), st.floats(-2, 2))
def test_pcb_equals_the_paper(deltas, keep, scale):
    merged = PCB(keep, scale).merge(deltas)
    torch.testing.assert_close(merged.dense().double(), pcb(deltas, keep, scale), **CLOSE)


@given(deltas_of_one_weight())
def test_pcb_of_all_entries_equals_the_paper_for_every_form(deltas):
    torch.testing.assert_close(PCB(keep=1.0).merge(deltas).dense().double(), pcb(deltas, keep=1.0), **CLOSE)
