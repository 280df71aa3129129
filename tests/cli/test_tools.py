"""The commands that need no training: what they print, what they write, and one sentence for every mistake."""

import io
import json
import shlex
import shutil
import sys
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from testbed.random_deltas import random_delta

from modular_experts import generate
from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.cli.merge import Tuning
from modular_experts.cli.study import next_steps
from modular_experts.cli.words import spelt_out
from modular_experts.library import Library, make_record, open_expert, write_expert
from modular_experts.progress import Counted
from modular_experts.reports.progress import progress_bar
from modular_experts.study.options import UsageError, words_of


@pytest.fixture
def place(tiny_llama_dir, tiny, tmp_path, monkeypatch):
    """A directory to stand in, with a library of three experts and one of another base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shapes = dict(Base.open(tiny_llama_dir).load().named_parameters())
    names = [name for name in shapes if name.endswith("_proj.weight")]
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    for seed, (name, form) in enumerate({"a": "Sparse", "b": "BlockSparse", "lora": "LowRank"}.items()):
        deltas = [(n, random_delta(form, shapes[n].shape, seed, torch.float32, share=0.05, tile=(8, 8))) for n in names]
        settings = {"keep_ratio": 0.0491712345, "modules": ".*[qk]_proj", "scheduler": None}
        scores = {"val_loss": 2.3456789, f"val_loss/task-{name}": 0.5}
        record = make_record(f"{form}Expert", base, hyperparameters=settings, tasks=[f"task-{name}"], scores=scores)
        write_expert(tmp_path / "library" / name, deltas, record)
    other = {**base, "id": "elsewhere", "fingerprint": "b" * 64}
    write_expert(tmp_path / "others/x", deltas, make_record("SparseExpert", other))
    return tmp_path


def test_a_users_own_method_by_its_dotted_path(run, place):
    (place / "my_methods.py").write_text(
        "from dataclasses import dataclass\n"
        "from modular_experts import MergeMethod\n\n\n"
        "@dataclass(frozen=True)\n"
        "class First(MergeMethod):\n"
        '    """Take the first expert.\n\n    Args:\n        scale: Factor.\n    """\n\n'
        "    scale: float = 1.0\n\n"
        "    def merge(self, deltas):\n        return deltas[0] * self.scale\n"
    )
    method = ["--method", "my_methods.First", "--method.scale", "2"]
    arguments = ["merge", "--experts", "[library/a, library/b]", *method, "--out", "library/f"]
    assert run(*arguments)[0] == 0
    name = next(iter(open_expert("library/a")))
    assert torch.equal(open_expert("library/f")[name].dense(), open_expert("library/a")[name].dense() * 2)
    assert open_expert("library/f").record["method"] == {"class_path": "my_methods.First", "init_args": {"scale": 2.0}}


def test_apply_writes_a_checkpoint_and_says_how_it_was_checked(done, place, tiny_llama_dir):
    out = done("apply", "--base", tiny_llama_dir, "--experts", "[library/a]", "--out", "merged")
    assert "the largest difference of a logit is 0 (tolerance 0.001)" in out
    assert json.loads((place / "merged/modular_experts.json").read_text())["check"]["largest_difference"] == 0
    assert "merged: a checkpoint" in out


def test_list_shows_the_others_beside_damaged_and_incomplete_ones(run, place):
    (place / "library/a/delta.safetensors").write_bytes(b"")
    (place / "library/b/expert.json").write_text("{broken")
    shutil.copytree(place / "library/lora", place / "library/half")
    (place / "library/half/expert.json").unlink()
    shutil.copytree(place / "library/lora", place / "library/bad [name]")
    code, out, _ = run("list", "library")
    assert code == 0
    kinds = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert all("damaged" in kinds[name] for name in ("a", "b", "half", "bad [name]"))
    assert "LowRankExpert" in kinds["lora"]
    (place / "empty").mkdir()
    assert "has no experts yet" in run("list", "empty")[1]


def test_show_tells_kind_shares_norms_and_where_from(run, place):
    run("merge", "--experts", "[library/a, library/lora]", "--method", "Average", "--out", "library/m")
    code, out, _ = run("show", "library/m")
    assert code == 0
    for text in ("Average(", "task-a, task-lora", "fingerprint", "parent", "layer", "q_proj", "content"):
        assert text in out
    assert "seed" not in out, "a merge draws nothing at random"
    assert max(map(len, out.splitlines())) <= 80
    expert = open_expert("library/a")
    total, kept = 0.0, 0
    for name in expert:
        total, kept = total + expert[name].dense().double().square().sum().item(), kept + expert[name].support_size
    out = run("show", "library/a", "--weights", "true")[1]
    size = f"{open_expert('library/a').size_on_disk / 1000:.3g} kB"
    assert out.split()[:8] == ["expert", "library/a", "holds", "14", "Sparse", "in", "float32;", size.split()[0]]
    assert "LowRank of rank 1 in float32" in run("show", "library/lora")[1]
    assert f"norm      {total**0.5:.4g}" in out
    assert "SparseExpert(keep_ratio=0.04917, modules='.*[qk]_proj')" in out.replace("\n", "")
    assert "validation loss: 2.346" in out
    assert "validation loss of task-a: 0.5" in out
    assert f"{kept:,} of " in out
    assert "model.layers.1.self_attn.q_proj.weight" in out.replace("\n", "")


def test_verify_one_a_library_and_a_base(run, refused, place, tiny_llama_dir, tiny):
    assert "is the one it was trained on" in run("verify", "library/a")[1]
    assert "all 3 experts are intact" in run("verify", "library")[1]
    assert "base not checked" in run("verify", "others/x")[1]
    assert run("verify", "library/a", "--base", tiny_llama_dir)[0] == 0
    assert "trained on another base" in refused("verify", "library/a", "--base", tiny("qwen2"))
    file = place / "library/b/delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = run("verify", "library")
    assert (code, "library/a: intact" in out) == (1, True)
    assert "b/delta.safetensors is damaged" in err
    assert "1 of 3 experts in library failed: b" in err


MERGE = ["merge", "--experts", "[library/a, library/b]", "--out", "library/new", "--method"]
MISTAKES = [
    (["mrege"], 2, "no command mrege; did you mean merge?"),
    (["compare"], 2, "no command compare; did you mean evaluate?"),
    (["--config", "x.yaml", "merge"], 2, "the command comes first"),
    (["merge", "--exprts", "[a]"], 2, "no option --exprts; did you mean --experts?"),
    (["generate", "hi", "--model.max_new_tokens", "3"], 2, "did you mean --max_new_tokens?"),
    ([*MERGE, "SparsAverage"], 2, "no class 'SparsAverage'; did you mean SparseAverage?"),
    ([*MERGE, "TIES", "--method.keep", "much"], 2, "--method.keep must be of type float or list[float], got much"),
    ([*MERGE, "TIES", "--method.zero", "positve"], 2, "weight_majority, got positve; did you mean positive?"),
    ([*MERGE, "nowhere.Method"], 2, "--method: nowhere.Method cannot be imported: No module named 'nowhere'"),
    ([*MERGE, "TIES", "--method.keep", "1.5"], 1, "must be in (0, 1], got 1.5"),
    (["merge", "--method", "TIES", "--out", "library/new"], 2, "--experts must be given"),
    (["merge", "--method", "TIES"], 2, "--experts and --out must be given"),
    (["merge", "--experts", "[]", "--method", "TIES", "--out", "library/new"], 1, "list of experts is empty"),
    (["merge", "--experts", "[library/aa]", "--method", "TIES", "--out", "library/new"], 1, "did you mean"),
    (["merge", "--experts", "[library/a]", "--method", "TIES", "--out", "library/b"], 1, "exists already"),
    (["merge", "--experts", "[library/a, others/x]", "--method", "TIES", "--out", "library/new"], 1, "different bases"),
    (["merge", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
    (["apply", "--experts", "[library/a]", "--out", "new", "--base", "nowhere"], 1, "or a hub id while the hub"),
    (["apply", "--experts", "[others/x]", "--out", "new"], 1, "base 'elsewhere' was not found"),
    (["verify", "."], 1, ". holds no expert"),
    (["list"], 2, "--library must be given"),
]


def test_each_mistake_gets_one_sentence_and_leaves_nothing(run, place):
    before = sorted(str(path) for path in place.rglob("*"))
    for argv, code, sentence in MISTAKES:
        found, out, err = run(*argv)
        assert (found, out) == (code, ""), argv
        assert sentence in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, "one line, unwrapped"
        assert sorted(str(path) for path in place.rglob("*")) == before, argv


HINTS = {"dry_run": bool, "experts": list[str] | None, "modules": str | list[str], "out": str, "max_memory": str}
HINTS |= {"per_weight": dict[str, str] | None, "recipe": str, "tune": Tuning | None}
SPELT = {
    "--experts a b --out c": ['--experts=["a", "b"]', "--out=c"],
    "--experts a": ['--experts=["a"]'],
    "--experts [a] --out c": ["--experts=[a]", "--out=c"],
    "--out a b": ["--out=a", "--recipe=b"],
    "--experts a --out c --experts b": ["--out=c", '--experts=["a", "b"]'],
    "--experts null": ["--experts=null"],
    "--modules q_proj": ["--modules=q_proj"],
    "--modules [qv]_proj k_proj": ['--modules=["[qv]_proj", "k_proj"]'],
    "--dry-run": ["--dry_run=true"],
    "--dry_run --out a-b": ["--dry_run=true", "--out=a-b"],
    "--dry-run false --max-memory=2-GB": ["--dry_run=false", "--max_memory=2-GB"],
    "--dry-run=true a": ["--dry_run=true", "--recipe=a"],
    "--dry-run recipe.yaml": ["--dry_run=true", "--recipe=recipe.yaml"],
    "--dry-run --print-config": ["--dry_run=true", "--print_config="],
    "--dry_run False a": ["--dry_run=False", "--recipe=a"],
    "--per-weight.a-b[0-9]=c-d": ["--per_weight.a-b[0-9]=c-d"],
    "--tune.max-new-tokens 3": ["--tune.max_new_tokens=3"],
    "--tune --experts a": ["--tune={}", '--experts=["a"]'],
    "": [],
}


def test_options_may_have_dashes_lists_spaces_and_flags_no_value():
    for typed, words in SPELT.items():
        assert words_of(spelt_out(typed.split(), HINTS, ["recipe"]).options) == words
    with pytest.raises(UsageError, match="'b' is one argument too many"):
        spelt_out(["--dry_run", "a", "b"], HINTS, ["recipe"])
    with pytest.raises(UsageError, match="--experts needs a value"):
        spelt_out(["--experts", "--out", "c"], HINTS)


def test_generate_finds_its_prompt_where_people_put_it(place, run, monkeypatch, tiny_llama_dir) -> None:
    library = ["library/a", "library/b"]
    answers = {
        "moved": generate(None, "the word", library, max_new_tokens=7) + "\n",
        "base": generate(tiny_llama_dir, "the word", max_new_tokens=7) + "\n",
    }
    assert answers["moved"] != answers["base"]
    length = ("--max_new_tokens", "7")
    base = ("--base", tiny_llama_dir)
    for words, answer in [
        (("the word", "--experts", *library, *length), "moved"),
        ((*length, *base, "--experts", *library, "the word"), "moved"),
        ((*base, *length, "the word"), "base"),
    ]:
        assert run("generate", *words) == (0, answers[answer], ""), words
    monkeypatch.setattr(sys, "stdin", io.StringIO("the word\n"))
    assert run("generate", *base, *length) == (0, answers["base"], "")
    refusal = "error: --base or --experts must be given, on the command line or in --config\n"
    assert run("generate", "the word")[::2] == (2, refusal)


def test_a_line_comes_at_every_tenth_of_work_that_takes_more_than_five_seconds(monkeypatch, capsys) -> None:
    for seconds, wanted in ((2.5, [2, *range(4, 41, 4)]), (0.01, [])):
        ticks = count()
        clock = SimpleNamespace(monotonic=lambda ticks=ticks, seconds=seconds: seconds * next(ticks))
        monkeypatch.setattr("modular_experts.reports.progress.time", clock)
        assert list(progress_bar("searching")(Counted(range(40), "steps"))) == list(range(40))
        lines = capsys.readouterr().err.splitlines()
        # The clock goes on by 2.5 seconds at each item, so that the time left is the items left times 2.5.
        left = [f", {timedelta(seconds=round(2.5 * (40 - done)))} left" if done < 40 else "" for done in wanted]
        assert lines == [f"searching: {done} of 40 steps{then}" for done, then in zip(wanted, left, strict=True)]
    assert list(progress_bar("searching")([])) == []


def test_the_commands_at_the_end_work_as_typed(run, place) -> None:
    at = Path("runs/quick start")
    assert max(len(line) for step in next_steps(Path("runs/quickstart")) for line in step.splitlines()) <= 78
    for expert, task in (("a", "reverse"), ("b", "upper")):
        shutil.copytree(f"library/{expert}", at / f"library/sparse-{task}")
    for command in next_steps(at):
        words = shlex.split(command.replace("\\\n", " "))
        more = ["--eval_limit", "2", "--max_new_tokens", "2"] if words[1] == "evaluate" else []
        code, _, err = run(*words[1:], *more)
        assert (words[0], code) == ("modular-experts", 0), err
    assert "two" in Library(at / "library")
