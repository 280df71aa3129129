"""A tied base and its untied copy: they compute the same, and experts of both combine where that means one thing."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from testbed.peft_adapters import PEFT_WARNINGS, logits, save_adapter
from transformers import AutoModelForCausalLM

from modular_experts import Base, evaluate, import_expert, merge, open_expert, write_expert
from modular_experts.base.apply import applied
from modular_experts.base.files import fingerprint
from modular_experts.deltas import Sparse
from modular_experts.library import check_fingerprint, common_base, make_record

pytestmark = [pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS]
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with a tied base, its untied copy, and adapters: of each base one for `q_proj`, and for the copy one
    that moves the head and `q_proj`.
    """
    place = tmp_path_factory.mktemp("made")
    with contextlib.chdir(place):
        make()
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of that directory to stand in."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make() -> None:
    build_model("llama", tie_word_embeddings=True).save_pretrained("tied")
    build_tokenizer().save_pretrained("tied")
    Base.open("tied").untie("untied")
    for seed, (name, base, modules) in enumerate(
        [("plain", "tied", ["q_proj"]), ("other", "untied", ["q_proj"]), ("head", "untied", ["q_proj", "lm_head"])]
    ):
        config = LoraConfig(r=2, lora_alpha=4, target_modules=modules, task_type="CAUSAL_LM")
        import_expert(save_adapter(Path(base), Path("peft", name), config, seed), f"library/{name}")
    record = make_record("SparseExpert", Base.open("tied").facts)
    shape = load_file("tied/model.safetensors")[EMBEDDINGS].shape
    write_expert("library/both", {EMBEDDINGS: Sparse(torch.tensor([3]), torch.ones(1), shape)}, record)


def stated(name: str) -> dict[str, torch.Tensor]:
    """Return the deltas of an adapter, from its file and the formula of LoRA with alpha 4 and rank 2."""
    tensors = load_file(f"peft/{name}/adapter_model.safetensors")
    downs = {key: key.removeprefix("base_model.model.").replace("lora_A.weight", "weight") for key in tensors}
    return {
        weight: 2 * tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        for key, weight in downs.items()
        if "lora_A" in key
    }


def test_the_untied_copy_computes_the_same_and_knows_its_base(place):
    copy, base = Base.open("untied"), Base.open("tied")
    weights = AutoModelForCausalLM.from_pretrained("untied").state_dict()
    assert torch.equal(weights[HEAD], weights[EMBEDDINGS])
    assert torch.equal(logits(copy.load()), logits(base.load()))
    assert copy.untied_from == {"fingerprint": base.fingerprint, "head": HEAD, "embeddings": EMBEDDINGS}
    assert copy.load().lm_head.weight.data_ptr() != copy.load().model.embed_tokens.weight.data_ptr()
    assert base.untied_from is None
    assert base.fingerprint != copy.fingerprint
    # transformers saves the same tensors in one file.
    copy.load().save_pretrained("again")
    assert fingerprint("again") == copy.fingerprint
    assert Base.open("again").untied_from == copy.untied_from
    changed = load_file("again/model.safetensors")
    save_file(changed | {HEAD: changed[HEAD] + torch.eye(*changed[HEAD].shape)[:, :32]}, "again/model.safetensors")
    assert Base.open("again").untied_from is None
    with pytest.raises(ValueError, match="so there is nothing to untie"):
        copy.untie("twice")


def test_a_base_that_stores_its_head_too_is_not_untied(tmp_path):
    build_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for head, why in (
        (stored[EMBEDDINGS].clone(), "so a copy would have the same fingerprint; write it anew"),
        (stored[EMBEDDINGS] + 1, "with other values than model.embed_tokens.weight, so transformers does not tie them"),
    ):
        save_file(stored | {HEAD: head}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=why):
            Base.open(tmp_path).untie(tmp_path / "untied")
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == torch.equal(head, stored[EMBEDDINGS])
        assert not (tmp_path / "untied").exists()
    # What the first sentence tells to do.
    save_file(stored | {HEAD: stored[EMBEDDINGS].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "anew")
    assert Base.open(tmp_path / "anew").untie(tmp_path / "untied").untied_from["head"] == HEAD


def test_a_merge_of_both_bases_experts_is_an_expert_of_the_copy(place):
    merged = merge(["library/plain", "library/other", "library/head"], "Average", "library/merged")
    assert merged.record["base"]["fingerprint"] == Base.open("untied").fingerprint
    assert merged.record["base"]["id"] == "untied"
    plain, other, head = map(stated, ("plain", "other", "head"))
    model = AutoModelForCausalLM.from_pretrained("untied")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            moved = [one[name] for one in (plain, other, head) if name in one]
            weight.copy_(weight.double() + sum(moved) / 3 if moved else weight)
    with applied(Base.open("untied").load(), merged) as put:
        found = logits(put._model)
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-5)
    # The head moved, and the embeddings did not.
    assert (model.lm_head.weight - model.model.embed_tokens.weight).abs().max() > 0.01


def test_an_expert_that_leaves_the_tied_tensor_alone_is_the_same_on_both(place, task_files):
    for expert in ("library/plain", "library/other"):
        scores = [
            evaluate(base, expert, str(task_files["upper"]), max_new_tokens=None).where(metric="loss").rows[0]["value"]
            for base in ("tied", "untied")
        ]
        assert scores[0] == scores[1]
    mixed = [open_expert("library/plain"), open_expert("library/head")]
    assert Base.open(None, mixed).place == "untied"


def test_an_expert_of_the_tensor_that_is_two_stays_with_its_base(place):
    both, head, plain = (open_expert(f"library/{name}") for name in ("both", "head", "plain"))
    why = f"moves {EMBEDDINGS} or {HEAD}; these are one tensor in a tied base and two in its untied copy"
    for experts in ([both, head], [head, both], [plain, both, head]):
        with pytest.raises(ValueError, match=f"both {why}, so it stays with tied "):
            common_base(experts)
    with pytest.raises(ValueError, match=f"both {why}"):
        Base.open("untied", [both])
    with pytest.raises(ValueError, match=f"head {why}, so it stays with untied "):
        Base.open("tied", [head])
    assert common_base([both, plain])["id"] == "tied"
    Base.open("untied", [head, plain])
    untied = Base.open("untied").untied_from
    for known in (None, untied | {"fingerprint": "0" * 64}):
        with pytest.raises(ValueError, match="plain was trained on another base than untied"):
            check_fingerprint([plain], Base.open("untied").fingerprint, "untied", known)
    # In memory, too: on a tied model a delta of the embeddings would move the head.
    facts = Base.open("untied").facts
    shape = both[EMBEDDINGS].shape
    write_expert("library/rows", {EMBEDDINGS: Sparse(torch.tensor([3]), torch.ones(1), shape)}, make_record("x", facts))
    with pytest.raises(ValueError, match=r"rows moves one of model.embed_tokens.weight and lm_head.weight alone"):
        applied(Base.open("tied").load(), "library/rows", check=False)


def test_an_adapter_of_the_head_alone_names_the_way_out(run, refused, place):
    config = json.loads(Path("peft/head/adapter_config.json").read_text())
    shutil.copytree("peft/head", "peft/wrong")
    Path("peft/wrong/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "tied"}))
    merge = ["merge", "peft/wrong", "peft/plain", "--method", "Average", "--out", "library/m"]
    way_out = "make an untied copy, in Python Base.open('tied').untie('untied'), and give it as the base"
    assert way_out in refused(*merge)
    assert run(*merge, "--base", "untied")[0] == 0
    code, _, err = run("merge", "peft/head", "peft/plain", "--method", "Average", "--out", "library/n")
    assert code == 0, err
    assert open_expert("library/m").content_hash == open_expert("library/n").content_hash


def test_an_expert_of_the_embeddings_does_not_go_from_a_base_that_stores_its_head_to_an_untied_copy(place):
    """Both store the same tensors, so that their fingerprints are equal."""
    shutil.copytree("untied", "stores")
    for file in ("config.json", "modular_experts.json"):
        Path("stores", file).write_bytes(Path("tied", file).read_bytes()) if Path("tied", file).exists() else None
    tied = Base.open("stores")
    assert tied.fingerprint == Base.open("untied").fingerprint
    assert tied.untied_from is None
    both = open_expert("library/both")
    write_expert("library/moved", dict(both.items()), make_record("SparseExpert", tied.facts))
    inner = {Q: Sparse(torch.tensor([3]), torch.ones(1), (32, 32))}
    write_expert("library/inner", inner, make_record("SparseExpert", tied.facts))
    Base.open("stores", [open_expert("library/moved"), open_expert("library/inner")])
    Base.open("untied", [open_expert("library/inner")])
    for measure in (
        lambda: Base.open("untied", [open_expert("library/moved")]),
        lambda: applied(AutoModelForCausalLM.from_pretrained("untied"), "library/moved"),
    ):
        with pytest.raises(ValueError, match=r"moved moves .* these are one tensor in a tied base and two"):
            measure()
