"""`import`: what it prints, what it writes, and one sentence for every mistake."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_model
from peft import LoHaConfig
from safetensors.torch import load_file, save_file
from testbed.peft_adapters import save_adapter

from modular_experts.base.files import fingerprint
from modular_experts.deltas import Sparse
from modular_experts.interop import import_expert as import_room
from modular_experts.interop.full_checkpoint import ImportedAdapter
from modular_experts.interop.import_expert import import_experts
from modular_experts.library import Library, open_expert

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def place(tiny_llama_dir, tmp_path, monkeypatch):
    """A directory to stand in, with a base and a LoRA."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama_dir, tmp_path / "base")
    write_lora(tmp_path / "lora")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/notes.txt").write_text("no weights here")
    return tmp_path


def write_checkpoints():
    """Write a base, and a checkpoint whose weights moved, one of them in five entries."""
    model = build_model("llama").bfloat16()
    model.save_pretrained("half")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        model.model.layers[1].mlp.up_proj.weight.copy_(build_model("llama").model.layers[1].mlp.up_proj.weight)
        model.model.layers[1].mlp.up_proj.weight[0, :5] += 1
    model.save_pretrained("tuned")


def write_lora(directory, base="base"):
    directory.mkdir(parents=True)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none", "task_type": "CAUSAL_LM"}
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "revision": None} | settings
    (directory / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)
    key = f"base_model.model.{Q.removesuffix('.weight')}"
    factors = {"lora_A": torch.randn(2, 32, generator=generator), "lora_B": torch.randn(32, 2, generator=generator)}
    save_file(
        {f"{key}.{name}.weight": factor for name, factor in factors.items()}, directory / "adapter_model.safetensors"
    )
    return 2.0 * factors["lora_B"].double() @ factors["lora_A"].double()


def test_a_full_checkpoint_is_imported_exactly_and_says_so(run, done, place, capsys):
    write_checkpoints()
    capsys.readouterr()
    out = done("import", "--source", "tuned", "--base", "half", "--out", "library/x", "--tasks", "[sums]")
    before, after = (load_file(f"{name}/model.safetensors") for name in ("half", "tuned"))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    entries, changed = (
        sum(count(name) for name in moved)
        for count in (lambda n: after[n].numel(), lambda n: int((after[n] != before[n]).sum()))
    )
    moves = f"{len(moved)} weights moved, in {changed:,} of their {entries:,} entries"
    assert out.splitlines()[:2] == [
        f"{moves}; {len(after) - len(moved)} are the base's",
        "exact: base plus delta is the checkpoint in every entry",
    ]
    assert out.splitlines()[2].startswith(f"library/x: checkpoint, {len(moved)} weights, ")
    expert = open_expert("library/x")
    assert expert.record["base"].items() >= {"id": "half", "revision": None, "fingerprint": fingerprint("half")}.items()
    assert expert.record["tasks"] == ["sums"]
    for name in moved:
        assert torch.equal((before[name].float() + expert[name].dense()).bfloat16(), after[name])
    assert run("apply", "--experts", "[library/x]", "--out", "full")[0] == 0
    assert all(torch.equal(value, after[name]) for name, value in load_file("full/model.safetensors").items())


def test_a_lora_is_imported_against_the_base_that_it_names(done, place):
    shutil.copy("base/config.json", "lora/config.json")  # some adapters carry it
    out = done("import", "--source", "lora", "--out", "library/lora")
    shutil.rmtree("lora")
    expected = write_lora(place / "lora")
    expert = open_expert("library/lora")
    assert list(expert) == [Q]
    assert expert.forms() == {Q: "LowRank"}
    torch.testing.assert_close(expert[Q].dense().double(), expected, rtol=1e-5, atol=1e-6)
    assert expert.record["base"]["fingerprint"] == fingerprint("base")
    assert expert.record["source"]["format"] == "PEFT adapter"
    assert sorted(expert.record["source"]["sha256"]) == ["adapter_config.json", "adapter_model.safetensors"]
    assert out.startswith("library/lora: LORA, 1 weights")


@pytest.mark.filterwarnings("ignore")  # what PEFT warns of while the adapter is made
def test_a_type_that_only_peft_reads_is_imported_and_its_check_is_printed(run, done, place, capsys):
    save_adapter(place / "base", place / "loha", LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    capsys.readouterr()
    out = done("import", "--source", "loha", "--out", "library/loha")
    assert "states 2 of the deltas; 0 are merged weight minus base; logits differ from PEFT's by at most " in out
    assert run("import", "--source", "lora", "--out", "library/lora")[0] == 0
    assert run("merge", "--experts", "library/loha", "library/lora", "--method", "TIES", "--out", "library/m")[0] == 0


def test_whatever_a_reader_gives_is_checked_against_the_base(refused, place, monkeypatch):
    for name, shape, sentence in (
        ("model.layers.0.self_attn.qproj.weight", (32, 32), f"has no such weight; did you mean {Q}"),
        (Q, (32, 31), "as a weight of shape (32, 31), and in base it has (32, 32)"),
    ):
        foreign = ImportedAdapter([(Q, Sparse.zero((32, 32))), (name, Sparse.zero(shape))], "LORA")
        monkeypatch.setattr(import_room, "read_peft", lambda *_, given=foreign: given)
        err = refused("import", "--source", "lora", "--out", "library/x")
        assert sentence in err
        assert list((place / "library").iterdir()) == []


def test_many_sources_and_patterns_are_imported_and_one_that_fails_stops_no_other(run, refused, place, caplog):
    for name, base in (("a", "base"), ("b", "gone"), ("c", "base")):
        write_lora(place / "peft" / name, base)
    Path("peft/notes.txt").write_text("no adapter")
    code, out, err = run("import", "peft/*", "--out", "library")
    assert code == 1
    assert [line.partition(":")[0] for line in out.splitlines()] == ["library/a", "library/c"]
    assert "peft/b: base 'gone' was not found" in caplog.text
    *told, last = err.splitlines()
    assert told == [f"importing peft/{name} ({number} of 3)" for number, name in enumerate("abc", 1)]
    assert last == "error: 1 of 3 sources did not become experts: peft/b"
    assert [*Library("library")] == ["a", "c"]
    # The same command goes on: the shell may spell the pattern out, and names the file, too.
    before = Path("library/a/expert.json").stat().st_mtime_ns
    words = [str(path) for path in sorted(Path("peft").iterdir())]
    code, out, err = run("import", *words, "--out", "library", "--base", "base")
    assert code == 0, err
    assert "library/a: there already, of the same files, left alone" in out
    assert out.splitlines()[-1] == "imported 1 expert into library"
    assert Path("library/a/expert.json").stat().st_mtime_ns == before
    assert [open_expert(f"library/{name}").record["tasks"] for name in "abc"] == [["a"], ["b"], ["c"]]
    factors = load_file("peft/a/adapter_model.safetensors")
    save_file({key: 2 * factor for key, factor in factors.items()}, "peft/a/adapter_model.safetensors")
    refused("import", "peft/[ac]", "--out", "library")
    assert "peft/a: library/a exists already; choose another place" in caplog.text
    assert run("import", "peft/[ac]", "--out", "library", "--overwrite")[0] == 0
    torch.testing.assert_close(open_expert("library/a")[Q].dense(), 4 * open_expert("library/c")[Q].dense())
    # One more goes into the library that is there, under its own name.
    assert run("import", "lora", "--out", "library")[0] == 0
    assert [*Library("library")] == ["a", "b", "c", "lora"]


def test_sources_of_one_name_get_the_directory_above_and_words_that_name_nothing_are_an_error(run, place):
    for name in ("dates/final", "mood/final", "dates/checkpoint-9"):
        write_lora(place / "runs" / name)
    assert run("import", "runs/*/*", "--out", "library")[0] == 0
    assert [*Library("library")] == ["dates-checkpoint-9", "dates-final", "mood-final"]
    code, _, err = run("import", "runs/none*", "--out", "library")
    assert (code, err) == (1, "error: no directory is called runs/none*; give directories or hub ids\n")
    code, _, err = run("import", "runs/*/*", "--out", "library", "--tasks", "dates")
    assert code == 2
    assert "--tasks is for one fine-tuning" in err
    for name in ("a/v/lora", "b/v/lora", "c/mood"):
        write_lora(place / "more" / name)
    # Names that stay equal are refused, and the same source counts once.
    done = import_experts(["more/a/v/lora", "more/b/v/lora", "more/c/mood", "more/c/mood/"], "new", overwrite=True)
    assert [expert.name for expert in done.experts] == [*Library("new")] == ["mood"]
    assert list(done.failed) == ["more/a/v/lora", "more/b/v/lora"]
    assert all("another of the sources would be called v-lora, too; import each" in why for why in done.failed.values())


def test_an_expert_of_another_base_is_not_the_one_that_is_asked_for(run, place):
    build_model("llama", seed=1).save_pretrained(place / "other")
    assert import_experts(["lora"], "library", "base").present == []
    done = import_experts(["lora"], "library", "other")
    assert done.present == []
    assert "lora exists already" in done.failed["lora"]
    assert import_experts(["lora"], "library").present == ["lora"]


def test_a_directory_with_the_signs_of_a_pattern_in_its_name_is_taken_as_it_is(done, place):
    write_lora(place / "runs[1]/lora")
    write_lora(place / "runs1/lora")
    done("import", "runs[1]/lora", "--out", "library/one")
    assert open_expert("library/one").record["source"]["id"] == "runs[1]/lora"
