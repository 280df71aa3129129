"""composable-sft: entries land where the writer put them, whole values become differences, and no pickle runs code."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from conftest import build_model

from modular_experts.deltas import Dense, Sparse
from modular_experts.interop.adapter import read_pickle
from modular_experts.interop.composable_sft import read_composable_sft
from modular_experts.interop.import_expert import import_expert

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


def test_an_import_says_where_it_came_from(tiny_llama_dir, tmp_path):
    source = write(tmp_path / "sft", {"diffs": {K: encode(sparse((16, 32), 2))}, "abs": {}})
    expert = import_expert(source, tmp_path / "library/x", tiny_llama_dir, tasks=["sums"])
    assert expert.record["kind"] == "composable-sft"
    assert expert.record["source"]["format"] == "composable-sft"
    assert list(expert.record["source"]["sha256"]) == ["pytorch_diff.bin"]
    assert torch.equal(expert[K].dense(), sparse((16, 32), 2))


def spoilt(entry, **changes):
    return {"diffs": {K: entry | changes}, "abs": {}}


def refusals():
    good = encode(sparse((16, 32), 2))
    nameless = {"diffs": {"model.layers.0.self_attn.kproj.weight": good}}
    yield nameless, rf"moves model.layers.0.self_attn.kproj.weight, .* no such weight; did you mean {K}"
    yield spoilt(good, size=torch.Size([32, 16])), r"as a weight of shape \(32, 16\), and in .* it has \(16, 32\)"
    yield {"abs": {NORM: torch.ones(31)}}, r"norm.weight as a weight of shape \(31,\), .* it has \(32,\)"
    yield spoilt(good, values=good["values"][:-1]), rf"damaged: {K} has \d+ indices for \d+ values"
    yield spoilt(good, index_steps=[5, -3], values=torch.ones(2)), rf"damaged: {K} has indices that are out of order"
    yield spoilt(good, index_steps=[5, 0], values=torch.ones(2)), r"out of order"
    yield spoilt(good, index_steps=[-1, 6], values=torch.ones(2)), r"out of order, or outside"
    yield spoilt(good, index_steps=[511, 1], values=torch.ones(2)), r"outside of its shape \(16, 32\)"
    yield spoilt(good, values=good["values"] * float("nan")), rf"the delta of {K} cannot be stored: .* not finite"
    yield {"diffs": {}, "abs": {}}, "is not a fine-tuning of composable-sft"
    yield {"diffs": {K: torch.ones(16, 32)}}, "is not a fine-tuning of composable-sft"
    yield {"diffs": {K: {"size": [16, 32], "indices": [[0], [1]], "values": [1.0]}}}, "index_steps, size, values"
    yield {"abs": {K: [1.0]}}, "is not a fine-tuning of composable-sft"
    yield {"weights": {}}, "is not a fine-tuning of composable-sft"
    yield [1, 2], "holds a list instead of a mapping"


def test_what_does_not_fit_is_refused_in_one_sentence_and_nothing_is_written(tiny_llama_dir, tmp_path):
    for content, sentence in refusals():
        with pytest.raises(ValueError, match=sentence) as caught:
            import_expert(write(tmp_path / "sft", content), tmp_path / "library/x", tiny_llama_dir)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "library").exists() or not list((tmp_path / "library").iterdir())


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


def test_a_damaged_file_is_refused(tmp_path):
    file = write(tmp_path / "sft", {"diffs": {}}) / "pytorch_diff.bin"
    for content in (file.read_bytes()[:-30], b"", b"nonsense", b"\x80\x02."):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_diff.bin was not read: it is damaged or not from torch"):
            read_pickle(file)
