"""Experts of any training loop go into a library and come back: deltas, moved biases, and states that are no delta."""

import conftest
import pytest
import torch
import transformers
from testbed.other_experts import BiasExpert, GatedExpert
from testbed.runs import take_steps

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.experts import FullExpert, LoRAExpert, SparseExpert
from modular_experts.injection import inject, load_expert_state
from modular_experts.injection.attach import attached
from modular_experts.injection.save import save_expert
from modular_experts.library import Library, make_record, open_expert, open_experts, write_expert

IDS = torch.arange(30).view(2, 15) + 3


def load(directory, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def train(model, experts, modules=None):
    inject(model, experts, modules)
    return take_steps(model, IDS)


def test_a_loop_of_ones_own_saves_an_expert_that_reproduces_it(tiny, tmp_path) -> None:
    model = train(load(tiny("qwen2")), {"v_proj": FullExpert, "q_proj": BiasExpert, "down_proj": LoRAExpert})
    expert = save_expert(model, tmp_path / "library/x", tasks=["t"], scores={"loss": 1.0}, seed=3)
    record = expert.record
    assert (record["format"], record["tasks"], record["seed"]) == ("modular-experts/1", ["t"], 3)
    assert record["kind"] == "BiasExpert+FullExpert+LoRAExpert"
    assert record["hyperparameters"]["rank"] == 8
    assert record["base"]["id"] == str(tiny("qwen2"))
    assert expert["model.layers.0.self_attn.q_proj.bias"].norm() > 0
    assert open_expert(expert.path).mergeable
    fresh = load(tiny("qwen2"))
    with applied(fresh, expert.path, check=True):
        torch.testing.assert_close(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_an_expert_on_top_of_another_is_the_distance_from_their_sum(tiny, tmp_path) -> None:
    first = save_expert(train(load(tiny("llama")), LoRAExpert, "q_proj"), tmp_path / "library/a")
    model = load(tiny("llama"))
    first.apply_to(model)
    second = save_expert(train(model, FullExpert, "q_proj"), tmp_path / "library/b", applied=[first.path])
    assert [parent["name"] for parent in second.record["parents"]] == ["a"]
    fresh = load(tiny("llama"))
    with (first + second).apply_to(fresh):
        torch.testing.assert_close(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_what_is_no_delta_is_stored_shown_verified_and_not_merged(tiny, tmp_path, capsys) -> None:
    model, library = train(load(tiny("llama")), GatedExpert, "q_proj"), tmp_path / "library"
    expert = save_expert(model, library / "gated")
    assert expert.record["files"] == ["state.safetensors"]
    assert sorted(file.name for file in expert.path.iterdir()) == ["expert.json", "state.safetensors"]
    assert expert.record["class_path"] == "testbed.other_experts.GatedExpert"
    assert not expert.mergeable
    assert (len(expert), list(Library(library))) == (0, ["gated"])
    twin = load(tiny("llama"))
    inject(twin, GatedExpert, "q_proj")
    load_expert_state(twin, open_expert(expert.path).state())
    assert torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
    sentence = "gated cannot be merged or added to its base, because its gate depends on the input; "
    with pytest.raises(ValueError, match=f"{sentence}evaluate, generate and serve use it as it is"):
        open_experts([expert.path])
    with pytest.raises(ValueError, match=f"{sentence}evaluate, generate and serve use it as it is"):
        applied(twin, expert)
    other = save_expert(train(load(tiny("llama")), LoRAExpert, "q_proj"), tmp_path / "other")
    with pytest.raises(ValueError, match=f"{sentence}leave it out of the list"):
        open_experts([other.path, expert.path])
    with pytest.raises(ValueError, match="cannot be added or scaled, because its gate depends on the input"):
        expert + expert
    assert main(["show", str(expert.path)]) == 0
    assert main(["list", str(library)]) == 0
    assert main(["verify", str(library)]) == 0
    assert "not possible, because its gate depends on the input" in capsys.readouterr().out
    assert main(["merge", "--experts", f"[{expert.path}]", "--method", "Average", "--out", str(tmp_path / "m")]) == 1
    assert sentence in capsys.readouterr().err


def test_a_state_of_a_class_that_is_not_built_in_is_refused(tiny_llama_dir, tmp_path) -> None:
    record = make_record("Mine", Base.open(tiny_llama_dir).facts, not_mergeable_because="it looks at the input")
    write_expert(tmp_path / "library/mine", {}, record, state={"w/x": torch.ones(2)})
    sentence = "mine cannot be added to its base, because it looks at the input, and its record names neither a plan"
    with pytest.raises(ValueError, match=sentence):
        attached(conftest.build_model("llama"), open_expert(tmp_path / "library/mine"))


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tiny, tmp_path) -> None:
    plain = load(tiny("llama"))
    with pytest.raises(ValueError, match="has no experts to save; put them in before training"):
        save_expert(plain, tmp_path / "x")
    other = conftest.build_model("llama")
    inject(other, SparseExpert, "q_proj")
    with pytest.raises(ValueError, match="does not know where it was loaded from; name its base"):
        save_expert(other, tmp_path / "x")
    with pytest.raises(ValueError, match=r"the trained model moves model\.layers.*no such weight"):
        save_expert(other, tmp_path / "x", base=tiny("gpt2"))
    assert not list(tmp_path.iterdir())
    saved = save_expert(other, tmp_path / "x", base=tiny("llama"))
    with pytest.raises(FileExistsError, match="exists already"):
        save_expert(other, saved.path, base=tiny("llama"))
