"""Checkpoints: found or refused with a sentence, loaded whole or a weight at a time, told apart by their contents."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, build_model, build_tokenizer
from safetensors.torch import load, load_file, save_file

from modular_experts.base import Base
from modular_experts.base.files import fingerprint


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def copy(tiny_llama_dir, tmp_path):
    return shutil.copytree(tiny_llama_dir, tmp_path / "copy")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_loaded_and_read_as_it_was_saved(tiny, architecture):
    base, original = Base.open(tiny(architecture)), build_model(architecture)
    model = base.load()
    assert not model.training
    for name, weight in original.named_parameters(remove_duplicate=False):
        assert torch.equal(model.get_parameter(name), weight)
        assert torch.equal(base.weight(name), weight), name
        assert base.structure.shapes[name] == weight.shape
    assert base.structure.architecture == type(original).__name__
    assert base.structure.weights == sorted(name for name, _ in original.named_parameters())


def test_dtype_is_the_one_asked_for_or_else_the_stored_one(tmp_path):
    build_model("llama").bfloat16().save_pretrained(tmp_path / "half")
    for dtype, expected in (("float64", torch.float64), (None, torch.bfloat16)):
        assert {weight.dtype for weight in Base.open(tmp_path / "half").load(dtype).parameters()} == {expected}


def test_base_is_found_where_the_record_or_the_library_leads(tiny_llama_dir, tmp_path):
    class Expert(dict):
        name, path = "one", tmp_path / "library/one"

        def __init__(self, place, mark=None):
            mark = mark or fingerprint(tiny_llama_dir)
            self.record = {"base": {"id": place, "revision": "r", "fingerprint": mark}}
            self.place = self.path

    shutil.copytree(tiny_llama_dir, tmp_path / "base")
    for named in (str(tiny_llama_dir), "elsewhere/base"):
        assert Base.open(experts=[Expert(named)]).revision == "r"
    assert Base.open(experts=[Expert("elsewhere/base")]).directory == tmp_path / "base"
    assert Base.open(tiny_llama_dir, [Expert("gone")]).place == str(tiny_llama_dir)
    with pytest.raises(ValueError, match=r"one was trained on another base than .*llama"):
        Base.open(tiny_llama_dir, [Expert("gone", "0" * 64)])
    with pytest.raises(ValueError, match=r"record of .*one does not name its base; give its directory"):
        Base.open(experts=[Expert(None)])
    with pytest.raises(ValueError, match=r"no base is named"):
        Base.open()
    opened = Base.open(tiny_llama_dir)
    assert Base.open(opened) is opened


def test_a_model_in_memory_is_no_base(tiny_llama_dir):
    with pytest.raises(TypeError, match="and not a LlamaForCausalLM; give its directory"):
        Base.open(Base.open(tiny_llama_dir).load())


def test_fingerprint_does_not_depend_on_path_or_sharding(tiny_llama_dir, copy, tmp_path):
    assert fingerprint(copy) == fingerprint(tiny_llama_dir)
    build_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "sharded") == fingerprint(tiny_llama_dir)


def test_fingerprint_tells_one_changed_entry(copy):
    before = fingerprint(copy)
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name].view(torch.int32)[0, 0] ^= 1  # the last bit
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy) != before
    weights[name].view(torch.int32)[0, 0] ^= 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy) == before
    narrow = "model.layers.0.self_attn.k_proj.weight"
    turned = {**weights, narrow: weights[narrow].view(32, 16)}
    save_file(turned, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy) != before
    renamed = {key.replace("layers.0", "layers.7"): value for key, value in weights.items()}
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy) != before


def test_fingerprint_is_remembered_and_an_unwritable_cache_does_not_matter(copy, tmp_path, monkeypatch):
    first = fingerprint(copy)
    [note] = (tmp_path / "cache/modular-experts/fingerprints").iterdir()
    note.write_text("0" * 64)
    assert fingerprint(copy) == "0" * 64
    note.write_text("half writ")
    assert fingerprint(copy) == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fingerprint(copy) == first


def test_files_that_are_missing_or_damaged_are_named(copy):
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    for function in (Base.open, fingerprint):
        with pytest.raises(ValueError, match=r"model.safetensors is damaged: it is cut short"):
            function(copy)
    weights.rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors, and only safetensors weights are read"):
        Base.open(copy).load()
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        Base.open(copy).load()
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing, so it is not the directory of a model"):
        Base.open(copy).load()


@pytest.mark.parametrize("change", ["missing", "mismatched"])
def test_weights_that_transformers_would_fill_with_noise_are_refused(copy, change):
    weights, name = load_file(copy / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not hold these weights of LlamaForCausalLM.*{name}"):
        Base.open(copy).load()


def test_padding_is_not_the_end_of_sequence_where_another_token_will_do(copy):
    assert Base.open(copy).tokenizer().pad_token == "<pad>"
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(copy)
    loaded = Base.open(copy).tokenizer()
    assert loaded.pad_token_id == 0
    assert loaded.pad_token_id != loaded.eos_token_id
    assert len(loaded) == len(tokenizer)


@pytest.mark.parametrize(
    ("file", "change", "is_another"),
    [
        ("config.json", {"rms_norm_eps": 0.25}, True),
        ("config.json", {"transformers_version": "9", "dtype": "bfloat16", "_name_or_path": "elsewhere"}, False),
        ("tokenizer.json", {"truncation": None, "version": "2"}, True),
        ("tokenizer_config.json", {"model_max_length": 7}, True),
        ("chat_template.jinja", {}, True),
        ("generation_config.json", {"top_k": 5}, False),
        ("notes.json", {}, False),
    ],
)
def test_a_base_is_its_weights_its_configuration_and_its_tokenizer(copy, tiny_llama_dir, file, change, is_another):
    opened = Base.open(copy)
    before = opened.identity
    assert before == Base.open(tiny_llama_dir).identity != opened.fingerprint
    content = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    (copy / file).write_text(json.dumps(content | change))
    assert (opened.identity != before) == is_another
    assert opened.fingerprint == fingerprint(tiny_llama_dir)


def test_another_weight_makes_another_base(copy):
    build_model("llama", seed=1).save_pretrained(copy)
    changed = Base.open(copy).identity
    build_model("llama", seed=2).save_pretrained(copy)
    assert Base.open(copy).identity != changed


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, "40KB"), (torch.float64, "1GB"), (torch.float16, "40KB"), (torch.bfloat16, "1GB")],
)
def test_weights_are_those_of_the_files_in_any_order(tmp_path, dtype, size):
    build_model("llama", 0).to(dtype).save_pretrained(tmp_path, max_shard_size=size)
    expected = {key: tensor for file in tmp_path.glob("*.safetensors") for key, tensor in load_file(file).items()}
    weights = Base.open(tmp_path).weights
    held = {name: weights.read(name) for name in [*expected, *reversed(expected)]}
    assert held.keys() == expected.keys()
    for name, tensor in held.items():
        assert torch.equal(tensor, expected[name])
        assert weights.dtype(name) == tensor.dtype == dtype
        assert weights.shape(name) == tensor.shape


def test_a_file_whose_numbers_lie_at_odd_places_is_read(tmp_path):
    build_model("llama", 0).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    expected, content = load(file.read_bytes()), file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + length]), separators=(",", ":")).encode()
    header += b" " * (1 - len(header) % 2)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    weights = Base.open(tmp_path).weights
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed by Linux")
def test_one_file_is_open_at_a_time(tmp_path):
    build_model("llama", 0).save_pretrained(tmp_path, max_shard_size="20KB")
    files = len(list(tmp_path.glob("*.safetensors")))
    before = len(list(Path("/proc/self/fd").iterdir()))
    weights = Base.open(tmp_path).weights
    held = [weights.read(name) for name in weights.structure.weights]
    del held
    assert files > 3
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
