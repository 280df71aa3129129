"""Full checkpoints: base plus delta is the fine-tuned model, losses are told, and what does not fit is refused."""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, build_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modular_experts.base import structure as stored
from modular_experts.deltas import Dense, Sparse
from modular_experts.interop.full_checkpoint import read_full_checkpoint
from modular_experts.interop.import_expert import import_expert

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(path, architecture="llama", dtype=torch.float32, noise=0.0, change=None, **settings):
    """Save a tiny model with noise on its weights; return the path and the weights by name."""
    saving = {name: settings.pop(name) for name in ("max_shard_size",) if name in settings}
    model = build_model(architecture, **settings).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if noise:
                weight.copy_(weight.float() + noise * torch.randn(weight.shape, generator=generator))
        if change is not None:
            change(dict(model.named_parameters(remove_duplicate=False)))
    model.save_pretrained(path, **saving)
    return path, {name: weight.detach().clone() for name, weight in model.named_parameters()}


def rewrite(directory, change):
    """Change the tensors in a checkpoint's one file."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, directory / "model.safetensors")
    return directory


def reconfigure(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def read(tuned, base, *arguments):
    imported = read_full_checkpoint(tuned, base, *arguments)
    return dict(imported.deltas), imported.deltas


def float64(tensor):
    return tensor.double().numpy()


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PAIRS = [(name, DTYPES[number % 3]) for number, name in enumerate(ARCHITECTURES)]


@pytest.mark.parametrize(("architecture", "dtype"), [*PAIRS, *(("llama", dtype) for dtype in DTYPES[:2])])
def test_base_plus_delta_is_the_checkpoint_in_every_entry(tmp_path, architecture, dtype):
    base, before = save(tmp_path / "base", architecture, dtype)
    tuned, after = save(tmp_path / "tuned", architecture, dtype, noise=0.01)
    deltas, source = read(tuned, base)
    total = source.record()["account"]
    assert deltas.keys() <= before.keys()
    for name, weight in after.items():
        assert name in deltas or torch.equal(before[name], weight)
        delta = deltas[name].dense() if name in deltas else torch.zeros(weight.shape)
        restored = (before[name].float() + delta).to(dtype)
        assert dtype == torch.float32 or torch.equal(restored, weight), name
        np.testing.assert_allclose(float64(restored), float64(weight), rtol=0, atol=1e-8)
    assert total["moved"] == sum(int((before[name] != weight).sum()) for name, weight in after.items())
    assert total["entries"] == sum(after[name].numel() for name in deltas)
    assert dtype == torch.float32 or total["missed"] == 0


def test_sharding_of_either_changes_nothing(tmp_path):
    base, _ = save(tmp_path / "base")
    tuned, _ = save(tmp_path / "tuned", noise=0.01)
    base_in_parts, _ = save(tmp_path / "base-parts", max_shard_size="40KB")
    tuned_in_parts, _ = save(tmp_path / "tuned-parts", noise=0.01, max_shard_size="30KB")
    assert len(list(tuned_in_parts.glob("*.safetensors"))) > 2
    whole = import_expert(tuned, tmp_path / "library/whole", base)
    parts = import_expert(tuned_in_parts, tmp_path / "library/parts", base_in_parts)
    assert parts.content_hash == whole.content_hash
    assert parts.record["base"]["fingerprint"] == whole.record["base"]["fingerprint"]
    assert len(parts.record["source"]["sha256"]) > 2


def test_an_old_checkpoint_without_the_prefix_is_understood(tmp_path):
    base, _ = save(tmp_path / "base", "gpt2")
    tuned, _ = save(tmp_path / "tuned", "gpt2", noise=0.01)
    expected, _ = read(tuned, base)

    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = torch.ones(4, 4)  # a mask that older versions stored

    for directory in (tuned, base):
        rewrite(directory, strip)
        deltas, _ = read(tuned, base)
        assert deltas.keys() == expected.keys()
        assert all(torch.equal(deltas[name].dense(), expected[name].dense()) for name in expected)


def test_few_changed_entries_are_stored_singly_and_without_loss(tmp_path):
    base, before = save(tmp_path / "base")

    def change(weights):
        weights[Q].view(-1)[[3, 500, 1023]] += torch.tensor([1.0, -2.0, 0.5])
        up, down = weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.mlp.down_proj.weight"]
        up.view(-1)[: up.numel() // 2 - 1] += 1.0
        down.view(-1)[: down.numel() // 2] += 1.0

    tuned, after = save(tmp_path / "tuned", change=change)
    deltas, source = read(tuned, base)
    forms = {name.split(".")[-2]: type(delta) for name, delta in deltas.items()}
    assert forms == {"q_proj": Sparse, "up_proj": Sparse, "down_proj": Dense}  # from half of the entries on, Dense
    assert source.same == len(before) - 3, "weights that are the base's are left out"
    assert deltas[Q].indices.tolist() == [3, 500, 1023]
    for name, delta in deltas.items():
        assert torch.equal(delta.dense(), after[name] - before[name])
        assert delta.nbytes <= 4 * delta.shape.numel()


def test_what_float32_cannot_hold_is_counted(tmp_path):
    large, small = torch.tensor([1.0, 1.0, 1e8]), torch.tensor([3e-9, 0.75, -0.123])
    base, _ = save(tmp_path / "base", change=lambda weights: weights[NORM][:3].copy_(large))
    tuned, _ = save(tmp_path / "tuned", change=lambda weights: weights[NORM][:3].copy_(small))
    _, source = read(tuned, base)
    one, other = large.numpy(), small.numpy()
    restored = one + (other - one)  # float32 throughout
    wrong = restored != other
    assert wrong.tolist() == [True, False, True]
    entry = source.report[NORM]
    assert entry.missed == 2
    assert entry.farthest == pytest.approx(np.abs(restored.astype(float) - other.astype(float)).max(), rel=1e-12)


def test_entries_that_only_lost_bits_did_not_move(tmp_path):
    base, before = save(tmp_path / "base")
    places = [0, 77, 1000]

    def change(weights):
        weights[Q].view(-1)[places] += 1.0

    tuned, after = save(tmp_path / "tuned", dtype=torch.bfloat16, change=change)
    deltas, source = read(tuned, base)
    assert list(deltas) == [Q]
    assert deltas[Q].indices.tolist() == places
    assert torch.equal((before[Q] + deltas[Q].dense()).bfloat16(), after[Q])
    entry = source.report[Q]
    assert (entry.moved, entry.missed) == (3, 0)


def test_one_pair_of_weights_is_held_at_a_time_and_no_model_is_loaded(tmp_path, monkeypatch):
    base, _ = save(tmp_path / "base", max_shard_size="40KB")
    tuned, after = save(tmp_path / "tuned", noise=0.01)
    held, most, order = [], [], []

    class Watched(stored.MappedTensors):
        def __init__(self, file):
            super().__init__(file)
            self.place = file.parent.name

        def __getitem__(self, key):
            tensor = super().__getitem__(key)
            held.append(weakref.ref(tensor))
            most.append(sum(reference() is not None for reference in held))
            order.append((self.place, key))
            return tensor

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(stored, "MappedTensors", Watched)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    imported = read_full_checkpoint(tuned, base)
    assert order == []
    names = [name for name, _ in imported.deltas]
    assert sorted(names) == sorted(after)
    assert max(most) == 2
    assert order == [(place, name) for name in sorted(after) for place in ("base", "tuned")]


def test_tied_embeddings_are_one_weight(tmp_path):
    base, before = save(tmp_path / "base", tie_word_embeddings=True)
    tuned, after = save(tmp_path / "tuned", noise=0.01, tie_word_embeddings=True)
    assert HEAD not in load_file(tuned / "model.safetensors")
    expert = import_expert(tuned, tmp_path / "library/x", base)
    assert HEAD not in expert
    assert torch.equal(before[EMBEDDING] + expert[EMBEDDING].dense(), after[EMBEDDING])
    assert expert.record["source"]["tied"] == {EMBEDDING: [EMBEDDING, HEAD]}
    twice = rewrite(shutil.copytree(tuned, tmp_path / "twice"), lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    assert import_expert(twice, tmp_path / "library/twice", base).content_hash == expert.content_hash
    moved = rewrite(shutil.copytree(base, tmp_path / "by-head"), lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    assert import_expert(tuned, tmp_path / "library/by-head", moved).content_hash == expert.content_hash
    # Where they are apart in the base, both move.
    apart, before = save(tmp_path / "apart")
    deltas, _ = read(tuned, apart)
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(before[name] + deltas[name].dense(), after[EMBEDDING], rtol=0, atol=1e-8)


def test_a_checkpoint_that_parted_what_is_tied_in_the_base_is_refused_unless_they_are_equal(tmp_path):
    base, _ = save(tmp_path / "base", tie_word_embeddings=True)
    tuned, _ = save(tmp_path / "tuned", noise=0.01)
    with pytest.raises(ValueError, match=r"are one tensor \(tied\) in .*base and two different ones in .*tuned"):
        read(tuned, base)
    rewrite(tuned, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    deltas, _ = read(tuned, base)
    assert HEAD not in deltas
    reconfigure(rewrite(tuned, lambda tensors: tensors[HEAD].add_(1.0)), tie_word_embeddings=True)
    told = r"are one tensor \(tied\) by the configuration of .*tuned, .* different values"
    with pytest.raises(ValueError, match=told):
        read(tuned, base)


@pytest.mark.parametrize("rows", [90, 108])
def test_a_resized_vocabulary_is_refused(tmp_path, rows):
    base, before = save(tmp_path / "base", dtype=torch.bfloat16)
    tuned, _ = save(tmp_path / "tuned", dtype=torch.bfloat16, vocab_size=rows, noise=0.01)
    ours = before[EMBEDDING].shape[0]
    with pytest.raises(ValueError, match=rf"shape \({rows}, .* and \({ours}, .*, so its vocabulary was resized"):
        read(tuned, base)
