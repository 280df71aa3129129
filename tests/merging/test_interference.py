"""Every measure of interference against its definition in numpy, entry by entry, for every form of a delta."""

import numpy as np
import pytest
import torch
from testbed.random_deltas import random_delta

from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.merging.interference import interference, mean_of_others
from modular_experts.merging.merged import Merged
from modular_experts.methods import TIES, SparseAverage

SHAPES = {"model.layers.0.a.weight": (7, 10), "model.layers.1.a.weight": (6, 9), "head.weight": (4, 5)}
BASE = {"id": "base", "revision": None, "fingerprint": "a" * 64}


@pytest.fixture
def library(tmp_path):
    """Experts of every form; the last does not move the head."""
    for number, form in enumerate(("Sparse", "BlockSparse", "LowRank", "Dense")):
        names = list(SHAPES)[: 2 if form == "Dense" else 3]
        deltas = ((name, random_delta(form, SHAPES[name], 10 * number + 1, torch.float32)) for name in names)
        write_expert(tmp_path / form.lower(), deltas, make_record("SparseExpert", BASE))
    return [tmp_path / name for name in ("sparse", "blocksparse", "lowrank", "dense")]


def flat(place, names):
    stored = open_expert(place)
    parts = [stored[n].dense() if n in stored else torch.zeros(SHAPES[n]) for n in names]
    return torch.cat([part.flatten() for part in parts]).double().numpy()


def check(sums, vectors, merged):
    for i, one in enumerate(vectors):
        for j, other in enumerate(vectors):
            both = (one != 0) & (other != 0)
            either = (one != 0) | (other != 0)
            cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other)) if one.any() and other.any() else 0.0
            np.testing.assert_allclose(sums.cosine[i, j], cosine, atol=1e-12)
            np.testing.assert_allclose(sums.overlap[i, j], both.sum() / max(either.sum(), 1))
            np.testing.assert_allclose(sums.conflict[i, j], (one * other < 0).sum() / max(both.sum(), 1))
        distance = ((merged - one) ** 2).sum() / (one**2).sum() if one.any() else np.nan
        np.testing.assert_allclose(sums.distance[i], distance, rtol=1e-6)


@pytest.mark.parametrize("method", [SparseAverage(), TIES(keep=0.5)], ids=str)
def test_every_measure_is_its_definition(library, method, monkeypatch):
    monkeypatch.setattr("modular_experts.merging.interference.HELD", 80)
    found = interference(library, method)
    assert found.experts == [place.name for place in library]
    groups = {"model.layers.0": [0], "model.layers.1": [1], "": [2]}
    merged = Merged(library, method)
    for chosen, sums in [([0, 1, 2], found.total), *((groups[name], sums) for name, sums in found.layers.items())]:
        names = [list(SHAPES)[number] for number in chosen]
        whole = torch.cat([merged[name].dense().flatten() for name in names]).double().numpy()
        check(sums, [flat(place, names) for place in library], whole)
    assert set(found.layers) == set(groups)
    report = found.as_dict()
    assert report["cosine"] == found.total.cosine.tolist()
    assert set(report["layers"]) == set(groups)
    others = (found.total.overlap.sum(1) - 1) / (len(library) - 1)
    torch.testing.assert_close(mean_of_others(found.total.overlap), others)
