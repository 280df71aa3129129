"""composable-sft: entries land where the writer put them, whole values become differences, and no pickle runs code."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from conftest import build_model

from modular_experts.deltas import Dense, Sparse
from modular_experts.interop.import_expert import import_expert
from modular_experts.interop.sparse import read_composable_sft

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
NORM, HEAD = "model.norm.weight", "lm_head.weight"


def encode(dense, first=np.int64):
    """Write a tensor as composable-sft does: places counted in Fortran's order, as steps, the first a NumPy number."""
    places = np.flatnonzero(dense.numpy().ravel(order="F"))
    steps = np.diff(places, prepend=0).tolist()
    if steps:
        steps[0] = first(steps[0])
    values = torch.from_numpy(dense.numpy().ravel(order="F")[places].copy())
    return {"size": dense.shape, "index_steps": steps, "values": values}


def sparse(shape, seed, share=0.1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < share)


def write(directory, content):
    directory.mkdir(exist_ok=True)
    torch.save(content, directory / "pytorch_diff.bin")
    return directory


def read(directory, base):
    imported = read_composable_sft(directory, base)
    return dict(imported.deltas), imported


def test_entries_land_where_the_writer_put_them(tiny_llama_dir, tmp_path):
    dense = {Q: sparse((32, 32), 1), K: sparse((16, 32), 2), NORM: sparse((32,), 3, 0.5)}
    for first in (np.int64, np.int32, int):
        content = {"diffs": {name: encode(value, first) for name, value in dense.items()}, "abs": {}}
        deltas, imported = read(write(tmp_path / "sft", content), tiny_llama_dir)
        assert imported.kind == "composable-sft"
        assert deltas.keys() == dense.keys()
        for name, delta in deltas.items():
            assert isinstance(delta, Sparse)
            assert torch.equal(delta.dense(), dense[name])
            assert delta.indices.tolist() == dense[name].view(-1).nonzero()[:, 0].tolist()


def test_a_matrix_by_hand(tiny_llama_dir, tmp_path):
    # Row 2, column 0 is place 2; row 0, column 1 is place 16 of 16 rows; row 15, column 31 is the last of 512.
    content = {"size": torch.Size([16, 32]), "index_steps": [2, 14, 495], "values": torch.tensor([1.0, 2.0, 3.0])}
    deltas, _ = read(write(tmp_path / "sft", {"diffs": {K: content}}), tiny_llama_dir)
    assert deltas[K].indices.tolist() == [1, 64, 511]
    assert deltas[K].values.tolist() == [2.0, 1.0, 3.0]


def test_whole_values_become_differences_from_the_base(tiny_llama_dir, tmp_path):
    model = build_model("llama")
    few = model.get_parameter(Q).detach().clone()
    few[3, 4] += 1.0
    whole = {HEAD: torch.full((99, 32), 0.25), Q: few}
    deltas, imported = read(write(tmp_path / "sft", {"diffs": {}, "abs": whole}), tiny_llama_dir)
    assert isinstance(deltas[HEAD], Dense)
    assert torch.equal(deltas[HEAD].dense(), whole[HEAD] - model.lm_head.weight)
    assert deltas[Q].indices.tolist() == [3 * 32 + 4]
    assert imported.settings == {"whole_weights": 2}


def test_files_of_the_older_layout_are_read(tiny_llama_dir, tmp_path):
    dense = sparse((16, 32), 2)
    head = torch.ones(99, 32)
    deltas, _ = read(write(tmp_path / "sft", {"body": {K: encode(dense)}, "head": {HEAD: head}}), tiny_llama_dir)
    assert torch.equal(deltas[K].dense(), dense)
    assert HEAD in deltas
    assert read(write(tmp_path / "sft", {"body": {K: encode(dense)}, "head": None}), tiny_llama_dir)[0].keys() == {K}


def test_a_tied_weight_is_moved_under_its_first_name(tiny, tmp_path):
    dense = sparse((99, 32), 4)
    deltas, _ = read(write(tmp_path / "sft", {"diffs": {HEAD: encode(dense)}, "abs": {}}), tiny("gpt2"))
    assert list(deltas) == ["transformer.wte.weight"]


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_file_that_would_run_code_is_refused_and_the_code_does_not_run(tiny_llama_dir, tmp_path):
    trap = tmp_path / "trap"
    for content in (Malicious(trap), {"diffs": {K: Malicious(trap)}}, {"diffs": {}, "abs": {K: [Malicious(trap)]}}):
        source = write(tmp_path / "sft", content)
        with pytest.raises(ValueError, match=r"was not read: it asks to run posix.mkdir, and no code in a file is run"):
            import_expert(source, tmp_path / "library/x", tiny_llama_dir)
        assert not trap.exists()
    torch.load(source / "pytorch_diff.bin", weights_only=False)
    assert trap.exists(), "the trap works where it is not refused"
