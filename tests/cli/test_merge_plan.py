"""`merge` before and beside merging: the dry run, the limit of memory, and the checkpoint as output."""

import json

import pytest
import torch
from testbed.random_deltas import random_delta
from transformers import AutoModelForCausalLM

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.deltas import BlockSparse
from modular_experts.library import make_record, open_expert, open_experts, write_expert
from modular_experts.merging.estimate import estimate_merge
from modular_experts.merging.merged import Merged
from modular_experts.methods import SparseAverage, TSVMerge
from modular_experts.methods.chunks import chunks_of_size
from modular_experts.text import bytes_of


@pytest.fixture
def library(tiny_llama_dir, tmp_path):
    model = Base.open(tiny_llama_dir).load()
    record = make_record("X", {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)})
    for seed, name in enumerate(("a", "b")):
        deltas = [
            (weight, random_delta("Sparse", parameter.shape, seed, torch.float32, share=0.1) * 0.1)
            for weight, parameter in model.named_parameters()
            if "q_proj" in weight or "up_proj" in weight
        ]
        write_expert(tmp_path / name, deltas, record)
    return tmp_path


def command(library, *options):
    return ["merge", "--experts", f"[{library}/a, {library}/b]", "--out", str(library / "ab"), *options]


def test_dry_run_shows_the_method_of_each_weight_and_writes_nothing(library, capsys):
    rules = '{".*up_proj.*": {"class_path": "TSVMerge"}}'
    assert main(command(library, "--method", "SparseAverage", "--per_weight", rules, "--dry_run", "true")) == 0
    shown = capsys.readouterr().out
    assert "SparseAverage(scale=1.0" in shown
    assert "TSVMerge(" in shown
    stored = sum(sum(expert.stored_bytes().values()) for expert in open_experts([library / "a", library / "b"]))
    assert f"{stored / 1000:.3g} kB to read" in shown
    assert "nothing was written" in shown
    assert sorted(path.name for path in library.iterdir() if not path.name.startswith(".")) == ["a", "b"]


def test_too_little_memory_is_told_before_anything_is_written(library, capsys):
    assert main(command(library, "--method", "TSVMerge", "--max_memory", "10kB")) == 1
    error = capsys.readouterr().err
    assert "with TSVMerge needs about" in error
    assert "max_memory is 10 kB" in error
    assert not (library / "ab").exists()
    assert main(command(library, "--method", "TSVMerge", "--max_memory", "1GB")) == 0


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("512MiB", 2**29), ("1.5 kB", 1500), ("100", 100), (7, 7), ("3G", 3 * 10**9)]
)
def test_sizes_are_read_as_written(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["0.1", "0.0001kB", 0, "", "9" * 400 + "TB", "2 potatoes"])
def test_a_size_has_at_least_a_byte_and_an_end(text):
    with pytest.raises(ValueError, match="is not a size; write one such as 2GB"):
        bytes_of(text)


def test_matrices_of_all_experts_are_counted(library):
    experts = open_experts([library / "a", library / "b"])
    by_parts, whole = (estimate_merge(Merged(experts, method)) for method in (SparseAverage(), TSVMerge()))
    some, more = TSVMerge.needs.matrices, TSVMerge.needs.matrices_per_expert
    for one, other in zip(by_parts, whole, strict=True):
        assert one.read == other.read
        entries = one.shape[0] * one.shape[1]
        # By parts, single entries give single entries, which are counted with their indices.
        made = 2 * sum(expert.kept_entries()[one.name] for expert in experts)
        assert made < entries
        matrices = (some + 2 * more) * 8 * entries
        assert other.peak - one.peak == pytest.approx(matrices + (4 + 6) * (entries - made), abs=1)


@pytest.mark.parametrize(("tile", "share"), [((64, 1), 1), ((32, 16), 2), ((1, 48), 0)])
def test_entries_of_tiles_are_counted_where_a_part_is_large(tile, share, tmp_path):
    record = make_record("X", {"id": "base", "revision": None, "fingerprint": "0" * 64})
    delta = BlockSparse(torch.tensor([0, 2], dtype=torch.int32), torch.ones(2, *tile), torch.Size((64, 48)))
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        write_expert(path, [("w", delta)], record)
    experts = open_experts(paths)
    assert experts[0].tiles() == {"w": tile}
    peaks = []
    for part in (2**18, 500):  # the former is larger than the weight
        with chunks_of_size(part):
            peaks.append(estimate_merge(Merged(experts, SparseAverage()))[0].peak)
    scratch = (40 + 8 * 2) * (64 * 48 - 500)
    kept = 2 * tile[0] * tile[1]
    assert peaks[0] - peaks[1] == scratch - (8 * 2 * kept // share if share else 0)


def test_checkpoint_as_output_is_the_base_plus_the_merge(library, tiny_llama_dir, capsys):
    assert main(command(library, "--method", "SparseAverage")) == 0
    merged = open_expert(library / "ab")
    options = ["--method", "SparseAverage", "--output", "checkpoint"]
    assert main([*command(library, *options)[:4], str(library / "checkpoint"), *options]) == 0
    assert "the largest difference of a logit is 0" in capsys.readouterr().out
    plain, base = AutoModelForCausalLM.from_pretrained(library / "checkpoint"), Base.open(tiny_llama_dir).load()
    for name, weight in base.named_parameters():
        moved = merged[name].dense() if name in merged else 0
        torch.testing.assert_close(plain.get_parameter(name), weight + moved, rtol=0, atol=1e-7)
    manifest = json.loads((library / "checkpoint/modular_experts.json").read_text())
    assert manifest["method"]["class_path"].endswith("SparseAverage")
    assert [parent["name"] for parent in manifest["parents"]] == ["a", "b"]
    assert manifest["check"]["largest_difference"] == 0
    assert main([*command(library, *options)[:4], str(library / "checkpoint"), *options]) == 1
    assert "exists already" in capsys.readouterr().err
