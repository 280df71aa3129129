"""Apply: the checkpoint on disk is base plus deltas, loads with plain transformers, and is refused where it is not."""

import copy
import json
import shutil

import pytest
import torch
from conftest import build_model
from safetensors.torch import load_file, save_file
from testbed.random_deltas import random_delta
from testbed.stored_by_hand import number_the_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modular_experts.base import Base
from modular_experts.base.apply import applied, apply, apply_deltas, check_loaded
from modular_experts.base.files import fingerprint
from modular_experts.deltas import Dense
from modular_experts.deltas.task_vector import Sum
from modular_experts.library import make_record, open_expert, write_expert


def linear_weights(model):
    tied = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return [name for name, weight in model.named_parameters() if weight.ndim == 2 and id(weight) not in tied][:6]


def make(path, base, seed, form="Sparse", names=None):
    model = Base.open(base).structure.model
    names = names or linear_weights(model)
    deltas = [
        (n, random_delta(form, model.get_parameter(n).shape, seed, torch.float32, tile=(8, 8)) * 0.1) for n in names
    ]
    record = make_record("SparseExpert", {"id": str(base), "revision": None, "fingerprint": fingerprint(base)})
    write_expert(path, deltas, record)
    return path


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "neox"])
def test_checkpoint_is_base_plus_deltas_and_loads_with_plain_transformers(tiny, architecture, tmp_path):
    base = tiny(architecture)
    one = make(tmp_path / "one", base, 1, "Sparse")
    two = make(tmp_path / "two", base, 2, "BlockSparse")
    check = apply([one, two], tmp_path / "out", base)
    assert check.largest_difference == 0.0
    plain, before = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), Base.open(base).load()
    experts = [open_expert(one), open_expert(two)]
    for name, weight in before.named_parameters():
        expected = weight.double()
        for expert in experts:
            expected = expected + (expert[name].dense().double() if name in expert else 0)
        torch.testing.assert_close(plain.get_parameter(name).double(), expected, rtol=1e-6, atol=1e-7)
        assert name in experts[0] or torch.equal(plain.get_parameter(name), weight)
    tokens = torch.arange(20).view(1, 20)
    assert not torch.equal(plain(tokens).logits, before(tokens).logits)


def test_what_belongs_to_the_base_is_carried_along(tiny_llama_dir, tmp_path):
    base = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 1, "max_new_tokens": 7}')
    (base / "LICENSE").write_text("be kind")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "pytorch_model.bin").write_text("not this one")
    apply(str(make(tmp_path / "one", base, 1)), tmp_path / "out", base)  # one alone is a list of one
    for file in ("generation_config.json", "LICENSE", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes(), file
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"


@pytest.mark.parametrize(("stored", "written"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_sum_is_rounded_once_where_transformers_joins_the_tensors_of_a_mixture_of_experts(stored, written, tmp_path):
    build_model("mixtral").to(getattr(torch, stored)).save_pretrained(tmp_path / "base")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=stored)
    whole = "model.layers.0.mlp.experts.down_proj"
    delta = random_delta("Dense", before.get_parameter(whole)[2].shape, 1, torch.float32) * 0.1
    record = make_record("SparseExpert", {"id": "base", "fingerprint": fingerprint(tmp_path / "base")})
    write_expert(tmp_path / "expert", {f"{whole}[2]": delta}, record)
    apply(tmp_path / "expert", tmp_path / "out", tmp_path / "base", dtype=written)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").get_parameter(whole)
    expected = before.get_parameter(whole).detach().float().clone()
    expected[2] += delta.dense()
    torch.testing.assert_close(after, expected.to(getattr(torch, written)), rtol=0, atol=0)


@pytest.mark.parametrize("sabotage", [0.01, float("nan")])
def test_a_checkpoint_that_differs_when_reloaded_is_not_written(tiny_llama_dir, tmp_path, monkeypatch, sabotage):
    expert, load = make(tmp_path / "one", tiny_llama_dir, 1), AutoModelForCausalLM.from_pretrained

    def changed(place, **settings):
        loaded = load(place, **settings)
        if not isinstance(loaded, tuple):  # the reloaded checkpoint; the base is loaded with a report
            loaded.model.norm.weight.data += sabotage
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", changed)
    with pytest.raises(ValueError, match=r"was not written: loaded again, its logits differ by"):
        apply([expert], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_a_tied_weight_moves_once_under_its_first_name_only_even_if_it_is_stored_twice(tiny, tmp_path):
    base, name = tiny("gpt2"), "transformer.wte.weight"
    model = Base.open(base).load()
    delta = Dense(torch.randn(model.get_input_embeddings().weight.shape) * 0.1)
    with pytest.raises(ValueError, match=r"lm_head.weight is the same tensor as transformer.wte.weight \(tied\)"):
        apply_deltas(model, [{"lm_head.weight": delta}])
    record = make_record("X", {"id": str(base), "revision": None, "fingerprint": fingerprint(base)})
    write_expert(tmp_path / "head", [("lm_head.weight", delta)], record)
    with pytest.raises(ValueError, match=r"lm_head.weight is the same tensor as transformer.wte.weight \(tied\)"):
        apply([tmp_path / "head"], tmp_path / "out")
    write_expert(tmp_path / "both", [(name, delta)], record)
    assert apply([tmp_path / "both"], tmp_path / "out").largest_difference == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.lm_head.weight is plain.transformer.wte.weight
    torch.testing.assert_close(plain.lm_head.weight, Base.open(base).load().lm_head.weight + delta.values)
    twice = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(twice / "model.safetensors")
    stored = tensors[next(key for key in tensors if key.endswith("wte.weight"))]
    save_file(tensors | {"lm_head.weight": stored.clone()}, twice / "model.safetensors", metadata={"format": "pt"})
    record["base"] |= {"id": str(twice), "fingerprint": fingerprint(twice)}
    write_expert(tmp_path / "of-twice", [(name, delta)], record)
    assert apply([tmp_path / "of-twice"], tmp_path / "out-of-twice").largest_difference == 0


def test_progress_counts_the_weights_and_then_the_models_whose_logits_are_compared(tiny_llama_dir, tmp_path) -> None:
    counted = []

    def progress(items):
        counted.append([getattr(items, "unit", None), 0, len(items)])
        for item in items:
            yield item
            counted[-1][1] += 1

    apply([make(tmp_path / "one", tiny_llama_dir, 1)], tmp_path / "out", progress=progress)
    (_, _, weights), checks = counted
    assert weights == len(load_file(tmp_path / "out/model.safetensors"))
    assert checks == ["models checked", 2, 2]


def test_a_sum_is_rounded_once_and_what_that_takes_is_told(tmp_path):
    base = build_model("llama").bfloat16()
    base.save_pretrained(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = dict(base.named_parameters())[name].detach()
    draw, paths, total = torch.Generator().manual_seed(0), [], torch.zeros_like(weight, dtype=torch.float32)
    record = make_record("X", {"id": "base", "revision": None, "fingerprint": fingerprint(tmp_path / "base")})
    for number in range(3):
        delta = Dense(torch.randn(weight.shape, generator=draw) * 6e-4)
        paths.append(tmp_path / str(number))
        write_expert(paths[-1], [(name, delta)], record)
        total += delta.values
    found = apply(paths, tmp_path / "out", tmp_path / "base").rounding
    written, exact = Base.open(tmp_path / "out").weight(name), weight.double() + total.double()
    assert torch.equal(written, (weight.float() + total).bfloat16())
    assert found.moved == total.numel()
    assert found.unchanged == int((written == weight).sum()) > 0
    lost = (written.double() - exact).norm() / total.double().norm()
    assert found.lost == pytest.approx(lost.item(), rel=1e-3)
    wide = apply(paths, tmp_path / "wide", tmp_path / "base", dtype="float32").rounding
    assert (wide.lost, wide.unchanged) == (0.0, 0)


@pytest.mark.parametrize("size", ["40KB", "1GB"])
def test_sharded_base_gives_shards_of_the_same_names(size, tmp_path):
    build_model("llama").save_pretrained(tmp_path / "base", max_shard_size=size)
    if size == "1GB":
        number_the_file(tmp_path / "base")
    files = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    expert = make(tmp_path / "one", tmp_path / "base", 1)
    assert apply([expert], tmp_path / "out", dtype="bfloat16").largest_difference == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    before = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"]["total_size"] * 2 == before["metadata"]["total_size"]


def test_sum_that_overflows_the_dtype_is_refused_and_leaves_nothing(tiny_llama_dir, tmp_path):
    expert = make(tmp_path / "one", tiny_llama_dir, 1)
    stored = open_expert(expert)
    huge = [(name, stored[name] * 1e7) for name in stored]
    write_expert(tmp_path / "huge", huge, stored.record)
    with pytest.raises(ValueError, match=r"plus its delta is not finite in torch.float16; take a smaller scale"):
        apply([tmp_path / "huge"], tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge", "one"]


def test_a_weight_that_does_not_fit_is_refused_before_any_is_moved(tiny_llama_dir):
    model = Base.open(tiny_llama_dir).load()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    good = {"model.layers.0.self_attn.q_proj.weight": Dense(torch.ones(32, 32))}
    unknown = "model.layers.0.self_attn.q_prj.weight"
    with pytest.raises(ValueError, match=rf"moves {unknown}.*did you mean model.layers.0.self_attn.q_proj.weight"):
        apply_deltas(model, [good, {unknown: Dense(torch.ones(32, 32))}])
    with pytest.raises(
        ValueError, match=r"k_proj.weight as a weight of shape \(32, 16\), and in LlamaForCausalLM .* \(16, 32\)"
    ):
        apply_deltas(model, [good, {"model.layers.0.self_attn.k_proj.weight": Dense(torch.ones(32, 16))}])
    with pytest.raises(ValueError, match=r"q_proj.weight as a weight of shape \(16, 32\)"):
        apply_deltas(model, [{next(iter(good)): Dense(torch.ones(16, 32))}, good])
    with pytest.raises(ValueError, match="no such weight"), applied(model, [{unknown: Dense(torch.ones(2, 2))}]):
        pass
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    apply_deltas(model, [good])
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before[next(iter(good))])


def test_applied_adds_for_a_while_and_restores_bit_for_bit(tiny_llama_dir) -> None:
    model = Base.open(tiny_llama_dir).load()
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.get_parameter(name).clone()
    delta = torch.full(before.shape, 1e-8)  # added and taken off again, this would not give the same bits
    with applied(model, [{name: Dense(delta)}, {name: Dense(delta)}], scale=0.5):
        torch.testing.assert_close(model.get_parameter(name), before + 1e-8, rtol=0, atol=1e-9)
    with pytest.raises(RuntimeError, match="in between"), applied(model, [{name: Dense(torch.ones(before.shape))}]):
        raise RuntimeError("in between")
    assert torch.equal(model.get_parameter(name), before)


def test_experts_inside_of_others_add_up_and_each_exit_restores_bit_for_bit(tiny_llama_dir, tmp_path) -> None:
    one, two = (open_expert(make(tmp_path / name, tiny_llama_dir, seed)) for seed, name in enumerate(("one", "two")))
    model = Base.open(tiny_llama_dir).load()
    name, start = next(iter(one)), {key: weight.clone() for key, weight in model.state_dict().items()}
    with applied(model, one):
        outer = {key: weight.clone() for key, weight in model.state_dict().items()}
        for inner in (two, one):
            with applied(model, inner), two.apply_to(model, scale=0.5):
                wanted = start[name].double() + sum(each[name].dense().double() for each in (one, inner, 0.5 * two))
                torch.testing.assert_close(model.get_parameter(name).double(), wanted)
                with applied(copy.deepcopy(model), one):
                    pass
            assert all(torch.equal(weight, outer[key]) for key, weight in model.state_dict().items())
    assert all(torch.equal(weight, start[key]) for key, weight in model.state_dict().items())
    assert not [key for key in vars(model) if "applied" in key]
    other = build_model("llama", seed=5)
    with applied(other, one, check=False), pytest.raises(ValueError, match="load that base again"):
        applied(other, two)


def test_of_several_the_last_is_removed_first(tiny_llama_dir) -> None:
    model = Base.open(tiny_llama_dir).load()
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.get_parameter(name).clone()
    first, second = (applied(model, {name: Dense(torch.ones(before.shape))}) for _ in range(2))
    with pytest.raises(ValueError, match="added later are still in the model; remove those first"):
        first.remove()
    for one in (second, first, first, second):
        one.remove()
    assert torch.equal(model.get_parameter(name), before)


@pytest.fixture
def shards(tmp_path):
    """A base in many files, an expert, and the checkpoint of both."""
    build_model("llama").bfloat16().save_pretrained(tmp_path / "base", max_shard_size="6KB")
    expert = make(tmp_path / "one", tmp_path / "base", 1)
    apply([expert], tmp_path / "whole")
    return expert


def interrupt(expert, out, monkeypatch, at) -> list[str]:
    """Stop an application at the weight of a number, and return the list of all weights that are ever asked for."""
    asked, read = [], Sum.__getitem__

    def interrupted(self, name):
        asked.append(name)
        if len(asked) == at:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(Sum, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply([expert], out)
    return asked


def test_interrupted_checkpoint_goes_on_with_the_file_where_it_stopped(shards, tmp_path, monkeypatch):
    asked = interrupt(shards, tmp_path / "out", monkeypatch, 4)
    assert not (tmp_path / "out").exists()
    finished = len(list(next(tmp_path.glob(".out.*")).glob("model-*.safetensors")))
    assert finished > 0
    found = apply([shards], tmp_path / "out")
    assert found.largest_difference == 0
    assert len(asked) < 4 + len(open_expert(shards))  # what was finished was not asked for again
    for file in (tmp_path / "whole").iterdir():
        if file.name != "modular_experts.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    before, after = (json.loads((tmp_path / name / "modular_experts.json").read_text()) for name in ("whole", "out"))
    assert before["check"] == after["check"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "out", "whole"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_finished_files_that_changed_are_written_again(shards, tmp_path, monkeypatch):
    interrupt(shards, tmp_path / "out", monkeypatch, 6)
    (place,) = tmp_path.glob(".out.*")
    first, second, *_ = sorted(place.glob("model-*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    (place / f".{second.name}.json").write_text("")
    apply([shards], tmp_path / "out", verify=False)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", None])
def test_a_model_is_known_as_the_base_in_any_dtype(tmp_path, dtype):
    """Also where it was rounded on the way, as in a float32 model that was loaded in half precision."""
    build_model("llama").save_pretrained(tmp_path / "base")
    expert, base = open_expert(make(tmp_path / "one", tmp_path / "base", 1)), Base.open(tmp_path / "base")
    for model in (base.load(dtype), base.load(dtype).float()):
        check_loaded(model, [expert])
        weight = model.get_parameter(next(iter(expert)))
        weight.data[-1, -1] *= 1.01
        with pytest.raises(ValueError, match=r"is not what it is in .*base, on which one was trained"):
            check_loaded(model, [expert])
    model = base.load("float32")  # a change of the last bit, far too small for half precision
    weight = model.get_parameter(next(iter(expert)))
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(9.0))
    with pytest.raises(ValueError, match=r"is not what it is in .*base"):
        check_loaded(model, [expert])


def test_a_model_that_is_not_the_experts_base_is_refused_unless_unchecked(tiny_llama_dir, tmp_path, caplog):
    one, two = make(tmp_path / "one", tiny_llama_dir, 1), make(tmp_path / "two", tiny_llama_dir, 2)
    model = Base.open(tiny_llama_dir).load()
    apply_deltas(model, [open_expert(one)])
    with pytest.raises(ValueError, match=r"add several experts in one call"), applied(model, two):
        pass
    with applied(model, two, check=False):
        pass
    build_model("llama", seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"load that base again"), applied(Base.open(tmp_path / "other").load(), one):
        pass
    assert not caplog.records
    gone = shutil.copytree(tiny_llama_dir, tmp_path / "gone")
    three = make(tmp_path / "library/three", gone, 1)
    shutil.rmtree(gone)
    build_model("llama", seed=5).save_pretrained(tmp_path / "other")
    with applied(Base.open(tmp_path / "other").load(), three):
        assert "is not on this machine" in caplog.text


def test_tied_and_renamed_weights_are_compared_too(tiny, tmp_path):
    base = shutil.copytree(tiny("gpt2"), tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in stored.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    model, names = Base.open(base).load(), ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"]
    expert = open_expert(make(tmp_path / "one", base, 1, names=names))
    check_loaded(model, [expert])
    for name in names:
        model.get_parameter(name).data[0, 0] += 1
        with pytest.raises(ValueError, match=f"{name} of the model is not"):
            check_loaded(model, [expert])
        model.get_parameter(name).data[0, 0] -= 1
