"""`compress`: from a base and task files to a smaller base that plain transformers loads, and every mistake."""

import json
import shutil
from pathlib import Path

import conftest
import pytest
import torch
from safetensors.torch import load_file
from testbed import real_tasks
from transformers import AutoModelForCausalLM

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.data import Task, TaskMixture
from modular_experts.evaluation import evaluate
from modular_experts.systems.compress.candidates import rank
from modular_experts.systems.compress.compress import Compressed, Reduction, perplexity, read_texts
from modular_experts.systems.compress.compress import compress as make_smaller
from modular_experts.systems.compress.removable import Kept, Removable

SMALL = {"multiple": 4, "slack": 0.1, "evaluations": 8, "tokens": 400, "search_tokens": 80, "test_tokens": 200}
SMALL |= {"length": 20}


def compress(base, tasks, out, overwrite=False, progress=lambda *now: None, **settings) -> Compressed:
    return make_smaller(base, tasks, out, Reduction(**settings), overwrite=overwrite, progress=progress)


@pytest.fixture
def tasks(task_files) -> list[str]:
    return [str(file) for file in task_files.values()]


def record(place: Path) -> dict:
    return json.loads((place / "modular_experts.json").read_text())


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_the_command_makes_a_base_that_experts_train_on(architecture, run, tiny, two_task_files) -> None:
    base = tiny(architecture)
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    command = ["compress", "--base", base, "--keep", 0.7, "--tasks", "a.jsonl", "b.jsonl", "--out", "smaller", *words]
    code, out, err = run(*command)
    assert code == 0, err
    found = record(Path("smaller"))["found"]
    assert f"perplexity on {found['tokens']} tokens of the test rows" in out
    assert "100% of the work done" in err
    small = AutoModelForCausalLM.from_pretrained("smaller")
    whole = AutoModelForCausalLM.from_pretrained(base)
    assert 0.6 <= small.num_parameters() / whole.num_parameters() <= 0.7
    assert f"{small.num_parameters():,} of {whole.num_parameters():,} parameters" in out
    assert {file.name for file in Path("smaller").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "modular_experts.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert (base / "tokenizer.json").read_bytes() == Path("smaller/tokenizer.json").read_bytes()
    # The loaded checkpoint gives the reported numbers.
    texts = read_texts(["a.jsonl", "b.jsonl"], Base.open("smaller").tokenizer(), {"test": 200}, 20)
    for name, model in (("base", whole), (found["written"], small)):
        assert perplexity(model.eval(), texts["test"]) == pytest.approx(found["perplexity"][name], rel=1e-4)
    fit = ["fit", "--base", "smaller", "--expert", "LoRAExpert", "--modules", conftest.TARGETS[architecture]]
    code, _, err = run(*fit, "--tasks", "a.jsonl", "--steps", 2, "--out", "library/a")
    assert code == 0, err


def test_the_dtype_of_the_base_stays(tasks, tmp_path) -> None:
    base = tmp_path / "base"
    conftest.build_model("llama").to(torch.bfloat16).save_pretrained(base)
    conftest.build_tokenizer().save_pretrained(base)
    compress(base, tasks, tmp_path / "smaller", keep=0.8, **SMALL | {"evaluations": 1})
    assert {one.dtype for one in load_file(tmp_path / "smaller/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "smaller/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("members", ["importance", "masks"])
def test_the_best_candidate_is_written_also_after_an_interruption(members, tiny, tasks, tmp_path) -> None:
    how, searched = SMALL | {"keep": 0.7, "members": members}, 0

    def stop(what: str, done: float, total: float) -> None:
        nonlocal searched
        searched += what == "searching"
        if searched == 4:
            raise KeyboardInterrupt

    one, out = compress(tiny("llama"), tasks, tmp_path / "one", **how), tmp_path / "smaller"
    assert len(one.searched) == 8
    with pytest.raises(KeyboardInterrupt):
        compress(tiny("llama"), tasks, out, progress=stop, **how)
    assert not out.exists()
    (left,) = tmp_path.glob(".smaller.*/search.jsonl")
    stored = left.read_text().splitlines()
    assert 3 <= len(stored) <= 4
    # The stored values are taken, not measured again: without them the search would end elsewhere.
    left.write_text("".join(line.partition('"result"')[0] + '"result": 0.5}' + "\n" for line in stored))
    assert min(compress(tiny("llama"), tasks, out, **how).searched) < 1
    shutil.rmtree(out)
    # An equal seed finds it again.
    assert compress(tiny("llama"), tasks, out, **how).searched == one.searched
    assert fingerprint(out) == fingerprint(tmp_path / "one")
    # Cut by hand, the members that the record names give the lowest perplexity of the search.
    model = Base.open(tiny("llama")).load()
    kept = {
        kind: {int(block): torch.tensor(held) for block, held in members.items()}
        for kind, members in record(tmp_path / "one")["kept"].items()
    }
    texts = read_texts(tasks, conftest.build_tokenizer(), {"validation": 80}, 20)
    small = Removable(model, "base").cut(Kept(one.blocks, **kept))
    assert perplexity(small, texts["validation"]) == pytest.approx(min(one.searched), rel=1e-6)


@pytest.mark.parametrize(("keep", "better"), [(0.7, "cut"), (0.8, "reformed")])
def test_of_the_cut_and_the_corrected_model_the_better_on_validation_rows_is_written(
    keep, better, run, tiny, two_task_files
) -> None:
    words = [f"--{name}={value}" for name, value in (SMALL | {"evaluations": 1, "keep": keep}).items()]
    command = ["compress", "--base", tiny("llama"), "--tasks", "a.jsonl", "b.jsonl", "--out", "smaller"]
    code, out, err = run(*command, *words)
    assert code == 0, err
    found = record(Path("smaller"))["found"]
    assert found["written"] == better
    (told,) = [line for line in out.splitlines() if line.endswith("which was written")]
    assert f"{found['perplexity'][better]:.4g}" in told
    assert ("on the validation rows the corrected one is the worse" in out) == (better == "cut")
    small = AutoModelForCausalLM.from_pretrained("smaller").eval()
    texts = read_texts(["a.jsonl", "b.jsonl"], conftest.build_tokenizer(), {"validation": 80, "test": 200}, 20)
    assert perplexity(small, texts["test"]) == pytest.approx(found["perplexity"][better], rel=1e-6)
    cut, written = found["searched"][0], perplexity(small, texts["validation"])
    assert written == pytest.approx(cut, rel=1e-6) if better == "cut" else written < cut - 1e-3


def test_masks_start_at_the_best_scores_of_the_paper_and_exchange_members(tiny, tasks, tmp_path) -> None:
    def stop(what: str, done: float, total: float) -> None:
        if what == "correcting":
            raise KeyboardInterrupt

    how = SMALL | {"members": "masks", "keep": 0.8, "slack": 0.02, "evaluations": 12}
    with pytest.raises(KeyboardInterrupt):
        compress(tiny("llama"), tasks, tmp_path / "smaller", progress=stop, **how)
    (left,) = tmp_path.glob(".smaller.*/search.jsonl")
    # Two blocks stay or go, groups of heads are counted, and a block has a mask of its groups and one of its channels.
    masks = {}
    for *blocks, _, groups_0, channels_0, groups_1, channels_1 in [
        json.loads(line)["key"] for line in left.read_text().splitlines()
    ]:
        assert blocks == [1, 1], "the window has no room for one block alone"
        assert (groups_0.count("1"), channels_0.count("1")) == (groups_1.count("1"), channels_1.count("1"))
        masks.setdefault(channels_0.count("1"), []).append((channels_0, channels_1))
    texts = read_texts(tasks, conftest.build_tokenizer(), {"train": SMALL["tokens"]}, SMALL["length"])
    scores = rank(Removable(Base.open(tiny("llama")).load(), "base"), texts["train"]).entrywise["channels"]
    count, found = next(iter(masks.items()))
    for block, mask in enumerate(found[0]):
        assert {place for place in range(48) if mask[place] == "1"} == {*scores[block].topk(count).indices.tolist()}
    others = [sum(one != new for one, new in zip("".join(found[0]), "".join(new), strict=True)) for new in found[1:]]
    assert 0 < min(filter(None, others)) < count / 4, "few of the members are exchanged at once"


def test_rows_take_turns_and_splits_stay_apart(tasks) -> None:
    tokenizer = conftest.build_tokenizer()
    texts = read_texts(tasks, tokenizer, {"train": 90, "validation": 10_000, "test": 7}, 30)
    assert [tuple(text.shape) for text in texts.values()] == [(3, 30), (len(texts["validation"]), 30), (1, 7)]
    first = tokenizer.decode(texts["train"][0])
    assert first.startswith("upper ban: BAN<eos>reverse ban: ")
    assert "upper bat" not in tokenizer.decode(texts["validation"].flatten())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"keep": 1}, r"keep=1 must be in \(0, 1\)"),
        ({"keep": float("nan")}, r"keep=nan must be in \(0, 1\)"),
        ({"slack": 0}, r"slack=0 must be in \(0, 1\)"),
        ({"members": "random"}, "members='random' must be one of 'importance', 'masks'"),
        ({"evaluations": 0}, "evaluations=0 must be at least 1"),
        ({"test_tokens": 1}, "test_tokens=1 must be at least 2"),
        ({"keep": 0.05}, r"keep=0.05 and slack=0.1: .* leaves between 0.00% and 5.00% .* nearest is keep=0.3\d"),
        ({"keep": 0.8, "slack": 1e-6, "multiple": 16}, r"nothing that can be removed .* the nearest is keep=0.\d+"),
        ({"tasks": []}, "no tasks were given"),
        ({"tasks": ["empty.jsonl"]}, "empty.jsonl"),
        ({"base": "nowhere"}, "base 'nowhere' was not found"),
    ],
    ids=str,
)
def test_a_bad_setting_gets_one_sentence_before_the_model_is_loaded(
    settings, sentence, tiny, tasks, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Base, "load", lambda *_: pytest.fail("the model was loaded"))
    Path("empty.jsonl").touch()
    given = {"base": tiny("llama"), "tasks": tasks, "out": "smaller", "keep": 0.8} | SMALL | settings
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        compress(**given)
    # What is wrong with rows is a list of them.
    assert "\n" not in str(error.value) or "bad row" in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["empty.jsonl"]


def test_the_config_makes_a_smaller_base(tiny_llama_dir, tmp_path, monkeypatch) -> None:
    """It stands in the directory of a quickstart."""
    monkeypatch.chdir(tmp_path)
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/base").symlink_to(tiny_llama_dir)
    config = Path(__file__).parents[3] / "configs/compress/search.yaml"
    assert main(["compress", "--config", str(config), "--evaluations", "4"]) == 0
    assert Path("smaller/model.safetensors").stat().st_size < (tiny_llama_dir / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_a_smaller_smollm2_speaks_and_learns(tmp_path, monkeypatch) -> None:
    """Slow: 80 % of the parameters of SmolLM2 take two minutes of CPU time."""
    files = [str(file) for file in real_tasks.task_files().values()]
    monkeypatch.chdir(tmp_path)
    found = compress(real_tasks.SMOLLM2, files, "smaller", keep=0.8, evaluations=2, tokens=2048, test_tokens=1024)
    assert 0.78 * found.base <= found.parameters <= 0.8 * found.base
    perplexity = found.perplexity
    assert perplexity["base"] < perplexity["reformed"] < perplexity["cut"]
    fit = ["fit", "--base", "smaller", "--expert", "LoRAExpert", "--modules", "q_proj", "v_proj"]
    assert main([*fit, "--tasks", files[0], "--steps", "20", "--out", "library/intent"]) == 0
    data = TaskMixture([Task(path=files[0])], eval_limit=32)
    rows = evaluate("smaller", {"base": [], "expert": ["library/intent"]}, data, max_new_tokens=None)
    loss = {model: rows.where(model=model).mean("loss") for model in ("base", "expert")}
    assert loss["expert"] < loss["base"]
