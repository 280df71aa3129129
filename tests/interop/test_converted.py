"""PEFT adapters where an expert is expected: every command and call takes a directory or a hub id as it is."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save, save_file
from testbed.hub_server import Repository
from testbed.peft_adapters import PEFT_WARNINGS, configure, save_adapter

from modular_experts import open_expert
from modular_experts.base import Base
from modular_experts.base.files import cache_directory, fingerprint
from modular_experts.data import TaskMixture
from modular_experts.evaluation import evaluate
from modular_experts.injection.attach import attached
from modular_experts.library import Library
from modular_experts.library.compatibility import open_parents
from modular_experts.merging.merged import merge
from modular_experts.merging.objective import own_experts
from modular_experts.merging.route import route
from modular_experts.serving.models import Models
from modular_experts.study import read_study, results_of, run_study

pytestmark = [pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS]
TASKS = ["upper", "reverse"]


@pytest.fixture(scope="module")
def made(tiny_llama_dir, task_files, tmp_path_factory):
    """A base, and an adapter of each of two tasks, named after it."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(tiny_llama_dir, folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, name in enumerate(TASKS):
            shutil.copy(task_files[name], f"{name}.jsonl")
            config = LoraConfig(r=2 + seed, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
            save_adapter(Path("base"), folder / "peft" / name, config, seed)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A directory to stand in, with these."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path, dirs_exist_ok=True))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def both(*more: str) -> list[str]:
    return ["peft/upper", "peft/reverse", *more]


def stated(name: str) -> dict[str, torch.Tensor]:
    """Return the deltas of one of the adapters, from its files and the formula of LoRA."""
    tensors = load_file(f"peft/{name}/adapter_model.safetensors")
    config, found = json.loads(Path(f"peft/{name}/adapter_config.json").read_text()), {}
    for key in [key for key in tensors if "lora_A" in key]:
        up, down = tensors[key.replace("lora_A", "lora_B")].double(), tensors[key].double()
        weight = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        found[weight] = config["lora_alpha"] / config["r"] * up @ down
    return found


def double(name: str) -> None:
    """Write an adapter again with factors twice as large."""
    file = f"peft/{name}/adapter_model.safetensors"
    save_file({key: 2 * factor for key, factor in load_file(file).items()}, file)


def conversions() -> list[Path]:
    return sorted(cache_directory("adapters").glob("*/*"))


def test_an_adapter_is_converted_once_for_its_content_and_its_base(place, caplog):
    first = open_expert("peft/upper")
    (line,) = caplog.messages
    assert line.startswith("peft/upper is a PEFT adapter; the expert of base made from it is in ")
    assert str(first.path) in line
    assert first.name == "upper"
    assert first.record["tasks"] == ["upper"]
    assert first.record["source"]["id"] == "peft/upper"
    assert first.record["base"]["fingerprint"] == fingerprint("base")
    for name, delta in stated("upper").items():
        torch.testing.assert_close(first[name].dense().double(), delta, rtol=1e-5, atol=1e-7)
    caplog.clear()
    before = first.path.stat().st_ino
    assert open_expert("peft/upper").path.stat().st_ino == before
    assert not caplog.messages
    # Other contents, another base, or the base elsewhere: an expert of its own.
    double("upper")
    changed = open_expert("peft/upper")
    name = next(iter(changed))
    torch.testing.assert_close(changed[name].dense(), 4 * first[name].dense())
    weights = load_file("base/model.safetensors")
    shutil.copytree("base", "other")
    assert open_expert("peft/upper", "other").record["base"]["id"] == str(place / "other")
    save_file({key: weight + 1 for key, weight in weights.items()}, "base/model.safetensors", {"format": "pt"})
    assert open_expert("peft/upper").record["base"]["fingerprint"] == fingerprint("base")
    assert len(conversions()) == 4
    # The record leads to the base from any directory.
    os.chdir(place / "peft")
    assert Base.open(None, [open_expert("../peft/reverse", "../base")]).directory == place / "base"


@pytest.mark.filterwarnings("ignore")
def test_every_command_takes_adapters(run, place):
    tasks = ["upper.jsonl", "reverse.jsonl"]
    data, short = ["--data.tasks", *tasks], ["--max_new_tokens", "2"]
    commands = [
        ["interference", *both()],
        ["show", "peft/upper"],
        ["verify", "peft"],
        ["generate", "upper bad:", "--experts", *both(), *short],
        ["evaluate", "--experts", *both("sum=peft/upper+peft/reverse"), "--tasks", *tasks, *short, "--out", "runs/one"],
        ["statistics", *both(), "--kind", "gram", *data],
        ["merge", *both(), "--method", "RegMean", "--out", "library/gram"],
        ["search", *both(), "--algorithm", "ATLAS", "--algorithm.steps", "1", *short, "--out", "library/atlas", *data],
        ["shrink", *both(), "--bound", "9", "--out", "small", *data],
        ["route", *both(), "--out", "library/routed", *data],
        ["combine", *both(), *data, "--distilled.steps", "1", "--out", "combined"],
        ["evaluate", "--experts", "library/routed", "--tasks", *tasks, *short, "--out", "runs/routed"],
        ["apply", *both(), "--out", "checkpoint"],
        ["export", "peft/upper", "--out", "again"],
        ["remove", "library/average", "--expert", "peft/reverse", "--out", "library/left"],
    ]
    assert run("merge", *both(), "--method", "Average", "--out", "library/average")[0] == 0
    for command in commands:
        code, out, err = run(*command)
        assert code == 0, f"{command}: {out}{err}"
    assert len(conversions()) == 2
    # A router keeps its experts beside it.
    assert [*Library("library")] == ["atlas", "average", "gram", "left", "reverse", "routed", "upper"]
    assert [*Library("small")] == sorted(TASKS)
    for name, delta in stated("upper").items():
        torch.testing.assert_close(open_expert("library/left")[name].dense().double(), delta, rtol=1e-4, atol=1e-6)
    code, out, err = run("list", "peft")
    assert (code, err) == (0, "")
    assert out.count("PEFT adapter") == 2


def test_a_folder_of_adapters_is_a_library_to_route_and_serve(run, place):
    code, _, err = run("route", *both(), "--out", "peft/other", "--data.tasks", "reverse.jsonl")
    assert code == 1
    assert "peft/upper counts as trained on upper, and the task files have " in err
    assert "rows of reverse only; give its task's file, too; if it was trained on reverse, say so, and name DIR" in err
    assert "in its place: import peft/upper with --tasks reverse and --out DIR" in err
    data = ["--data.tasks", "upper.jsonl", "reverse.jsonl"]
    code, _, err = run("route", *both(), "--out", "peft/routed", *data)
    assert code == 0, err
    assert sorted(path.name for path in Path("peft").iterdir()) == ["reverse", "routed", "upper"]
    assert not Path("peft/upper/expert.json").exists()
    assert [*Library("peft")] == ["reverse", "routed", "upper"]
    models = Models("peft", fingerprint("base"), "base")
    kinds = {"base": "base", "reverse": "expert", "routed": "route", "upper": "expert"}
    assert [(one.name, one.kind) for one in models.listed()] == [*kinds.items()]
    (expert,) = models.find("upper").members
    assert expert.content_hash == open_expert("peft/upper").content_hash


def test_a_route_opens_the_adapters_beside_it_for_its_base(run, place):
    for name in TASKS:
        configure(Path("peft", name), base_model_name_or_path="nowhere/base")
    data = TaskMixture(["upper.jsonl", "reverse.jsonl"])
    opened = [open_expert(f"peft/{name}", "base") for name in TASKS]
    route(opened, "peft/routed", data=data)
    with attached(Base.open("base").load(), "peft/routed"):
        pass
    assert run("verify", "peft/routed")[0] == 0
    # A base that was moved is the one that is given.
    Path("base").rename("moved")
    scored = evaluate("moved", {"routed": ["peft/routed"]}, data, max_new_tokens=None)
    assert {row["model"] for row in scored.rows} == {"routed"}
    assert run("verify", "peft/routed", "--base", "moved")[0] == 0
    with pytest.raises(FileNotFoundError, match="the base that it names did not open; name it with `base=`"):
        open_parents(open_expert("peft/routed"))


def test_errors_name_an_adapter_and_not_the_cache(run, place):
    opened = [open_expert(f"peft/{name}") for name in TASKS]
    taken = r"`statistics` with `experts=\['peft/upper', 'peft/reverse'\]`, `kind='gram'` and `tasks=`"
    with pytest.raises(ValueError, match=f"peft/upper has no gram statistics.*{taken}"):
        merge(opened, "RegMean", "library/gram")
    assert own_experts(opened, ["upper"], {"upper": "peft/reverse"})["upper"] is opened[1]
    # No delta expresses this one, and the next one has no tensors.
    shutil.rmtree(cache_directory("adapters"))
    configure(Path("peft/upper"), peft_type="PROMPT_TUNING")
    code, _, err = run("merge", *both(), "--method", "Average", "--out", "library/both")
    assert code == 1
    assert "which moves no weight" in err
    assert [found.name for found in conversions()] == ["reverse"]
    Path("peft/upper/adapter_model.safetensors").unlink()
    code, _, err = run("show", "peft/upper")
    assert "adapter_model.safetensors is missing, so the adapter has no tensors" in err


def test_a_study_measures_and_merges_adapters_that_are_there(place, task_files):
    tasks = [str(task_files[name]) for name in TASKS]
    study = read_study("base", tasks, {"lora": {"stored": "peft"}}, ["Average"], max_new_tokens=2)
    with ThreadPoolExecutor(1) as executor:
        state = run_study(study, place / "study", executor=executor)
    assert not state.failed
    library = Library("study/library")
    assert [*library] == ["lora-reverse", "lora-upper", "merge-lora-Average"]
    for name, delta in stated("upper").items():
        torch.testing.assert_close(library["lora-upper"][name].dense().double(), delta, rtol=1e-5, atol=1e-7)
    models = {row["model"] for row in results_of(study, state).rows}
    assert {"base", "lora-upper", "lora-reverse"} <= models
    # An adapter that was trained again is measured again.
    double("upper")
    with ThreadPoolExecutor(1) as executor:
        assert not run_study(study, place / "study", executor=executor).failed
    assert library["lora-upper"].content_hash == open_expert("peft/upper").content_hash
    with pytest.raises(FileNotFoundError, match="peft/first is not an expert"):
        read_study("base", [*tasks, str(task_files["first"])], {"lora": {"stored": "peft"}})
    with pytest.raises(ValueError, match=r"experts\.all: stored is for kinds with an expert for each task"):
        read_study("base", tasks, {"all": {"stored": "peft", "joint": True}})


def test_a_base_is_named_only_where_the_adapter_leads_to_none(run, place, task_files):
    Path("base").rename("moved")
    code, out, err = run("merge", *both(), "--method", "Average", "--out", "library/both")
    assert (code, out) == (1, "")
    assert "peft/upper is a PEFT adapter, and the base that it names did not open; name it with --base" in err
    assert "with --source peft/upper, --base DIR and --out library/upper" in err
    assert "base 'base' was not found" in err
    assert run("merge", *both(), "--method", "Average", "--base", "moved", "--out", "library/both")[0] == 0
    assert open_expert("library/both").record["base"]["id"] == str(place / "moved")
    results = evaluate("moved", {"a": ["peft/upper"]}, str(task_files["upper"]), max_new_tokens=None)
    assert {row["model"] for row in results.rows} == {"a"}
    assert results.facts["models"] == {"a": [{"name": "upper", "place": "peft/upper"}]}
    assert run("generate", "upper bad:", "--experts", "peft/upper", "--base", "moved", "--max_new_tokens", "1")[0] == 0


def test_a_hub_id_is_an_adapter_that_is_fetched(run, place, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hub"))
    for repo, folder in (("me/upper", "peft/upper"), ("me/base", "base")):
        hub.repositories[repo] = Repository()
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        hub.repositories[repo].commit("main", files, "all of it")
    fetched = open_expert("me/upper")
    assert fetched.name == "upper"
    assert fetched.record["source"]["id"] == "me/upper"
    assert fetched.content_hash == open_expert("peft/upper").content_hash
    for wrong, sentence in (
        ("me/base", "me/base on the hub is no PEFT adapter: it has no adapter_config.json"),
        ("me/none", "expert 'me/none' was not found"),
        ("peft/none", "peft/none is not an expert: there is no such directory"),
    ):
        code, _, err = run("show", wrong)
        assert code == 1
        assert sentence in err
    assert run("push", "peft/reverse", "--repo", "me/experts", "--license", "mit")[0] == 0
    code, _, err = run("show", "me/experts")
    assert "it holds the experts reverse, which `pull` fetches with --repo me/experts and --out library" in err


def test_route_and_combine_take_the_base_and_its_dtype_for_adapters_whose_base_is_elsewhere(run, place, monkeypatch):
    for name in TASKS:
        configure(Path("peft", name), base_model_name_or_path="is/elsewhere")
    loaded, load = [], Base.load
    monkeypatch.setattr(Base, "load", lambda base, dtype=None: loaded.append(dtype) or load(base, dtype))
    how = ["--tasks", "upper.jsonl", "reverse.jsonl", "--base", "base", "--dtype", "bfloat16"]
    assert run("route", *both(), *how, "--out", "library/routed")[0] == 0
    assert loaded == ["bfloat16"]
    code, out, err = run("combine", *both(), *how, "--distilled.steps", "1", "--out", "combined")
    assert code == 0, f"{out}{err}"
    assert {*loaded} == {"bfloat16"}


def test_an_adapter_that_is_written_again_is_served_anew(place):
    models = Models("peft", fingerprint("base"), "base")

    def served() -> str:
        assert [one.name for one in models.listed()] == ["base", *sorted(TASKS)]
        return models.find("upper").members[0].content_hash

    file = Path("peft/upper/adapter_model.safetensors")
    for write in (lambda tensors: file.write_bytes(save(tensors)), lambda tensors: save_file(tensors, file)):
        before = served()
        write({key: 2 * factor for key, factor in load_file(file).items()})
        assert served() == open_expert("peft/upper").content_hash != before
    shutil.copytree("peft/reverse", "peft/new")
    shutil.rmtree("peft/upper")
    Path("peft/new").rename("peft/upper")
    assert served() == open_expert("peft/upper").content_hash


def test_an_adapter_that_does_not_fit_is_named_before_a_merge_or_left_out_of_it(run, place, tiny, caplog):
    shutil.copytree(tiny("llama", tie_word_embeddings=True), "tied")
    for name, modules in (("head", ["lm_head"]), ("query", ["q_proj"]), ("head-too", ["lm_head", "q_proj"])):
        save_adapter(
            Path("tied"), place / "more" / name, LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM")
        )
    named = [f"more/{name}" for name in ("head", "query", "head-too")]
    code, _, err = run("merge", *named, "--method", "Average", "--base", "tied", "--out", "library/one")
    assert code == 1
    assert "2 of 3 experts cannot be used: more/head: " in err
    assert "more/head-too: " in err
    assert err.endswith("Leave them out with --skip\n")
    code, _, err = run("merge", *named, "--method", "Average", "--base", "tied", "--out", "library/one", "--skip")
    assert code == 0, err
    assert "more/head is left out: " in caplog.text
    assert [parent["name"] for parent in open_expert("library/one").record["parents"]] == ["query"]
    code, _, err = run("interference", *named, "more/query", "--skip")
    assert code == 1
    assert "listed twice" in err
