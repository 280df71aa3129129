"""A real language model on real task files: three kinds of experts learn, and a merge of two keeps both tasks.

Slow. Tests of one kind share what they train, so they run in one process; tests of other kinds may run beside them. The
task files are read from the folder that MODULAR_EXPERTS_DATA names, and never copied. The model is the one that
`make smollm2` makes, or is converted on the spot where its package is installed.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from smollm2 import convert, find_gguf
from testbed.peft_adapters import logits, peft_logits
from testbed.peft_types import make_adapter

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.interop.import_expert import import_expert
from modular_experts.library import Library, open_expert

pytestmark = pytest.mark.slow

CONVERTED = Path(__file__).parent.parent / ".cache" / "smollm2"
INTENTS, BANKING = "snips_intent", "clinc_banking"
SENTENCE = "In the nineteenth century, railways changed how people travelled between cities, and how they kept time."
EXPERTS = {
    "sparse": ["SparseExpert", "--model.expert.keep_ratio", "0.05"],
    "lora": ["LoRAExpert", "--model.expert.rank", "8"],
    "full": ["FullExpert"],
}
TOGETHER = {"sparse": "sparse", "lora": "others", "full": "others"}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CONVERTED.is_dir():
        return CONVERTED
    try:
        find_gguf()
    except ValueError as error:
        pytest.skip(f"no SmolLM2 in .cache/smollm2 (`make smollm2` makes it), and it cannot be made: {error}")
    return convert(tmp_path_factory.mktemp("bases") / "smollm2")


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("MODULAR_EXPERTS_DATA")
    if not folder:
        pytest.skip("MODULAR_EXPERTS_DATA names no folder with snips_intent.jsonl and clinc_banking.jsonl")
    return Path(folder).resolve()


@pytest.fixture(scope="module")
def run(smollm2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Return a function that runs `fit` or `test` on some of the tasks, in one directory for all, and returns the
    scores of the last test.
    """
    place = tmp_path_factory.mktemp("real")

    def command(verb: str, tasks: list[str], *options: str) -> dict[str, Any]:
        rows = json.dumps([{"name": task, "path": str(data / f"{task}.jsonl")} for task in tasks])
        limits = ["--eval_limit", "16", "--max_length", "256", "--model.max_new_tokens", "8"]
        device = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            arguments = [verb, "--model.base", str(smollm2), "--tasks", rows, *limits, *device, *options]
            patch.setattr("sys.argv", ["modular-experts", *arguments])
            assert main(arguments) == 0
        written = sorted((place / "runs").glob("results*.json"), key=lambda file: file.stat().st_mtime_ns)
        return json.loads(written[-1].read_text())["tasks"] if written else {}

    command.place = place  # type: ignore[attr-defined]
    return command


@pytest.fixture(scope="module")
def base_scores(run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run("test", [INTENTS, BANKING])


def train(run: Callable[..., dict[str, Any]], kind: str, task: str) -> str:
    """Train an expert for 30 steps with the settings that its type comes with, and return its directory."""
    export = {"class_path": "ExportExpert", "init_args": {"library": "library", "name": f"{task}-{kind}"}}
    where = ["--model.modules", r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"]
    steps = ["--trainer.max_steps", "30", "--trainer.limit_val_batches", "0", "--trainer.enable_checkpointing", "false"]
    callbacks = ["--trainer.callbacks", json.dumps([export])]
    run("fit", [task], "--model.expert", *EXPERTS[kind], *where, *steps, *callbacks)
    return f"library/{task}-{kind}"


def test_the_converted_model_knows_english(smollm2: Path) -> None:
    model, tokenizer = Base.open(smollm2).load(), Base.open(smollm2).tokenizer()
    tokens = tokenizer(SENTENCE, return_tensors="pt").input_ids
    shuffled = tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        loss, noise = (model(rows, labels=rows).loss.item() for rows in (tokens, shuffled))
    assert loss < 4.5 < 6 < noise
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.model_max_length] == [0, 2, 8192]
    assert [model.generation_config.pad_token_id, model.generation_config.eos_token_id] == [0, 2]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.xdist_group(TOGETHER[kind])) for kind in EXPERTS]
)
def test_an_expert_learns_its_task(kind: str, run: Callable[..., dict[str, Any]], base_scores: dict[str, Any]) -> None:
    scores = run("test", [INTENTS], "--model.applied", f"[{train(run, kind, INTENTS)}]")[INTENTS]
    assert scores["loss"] < 0.3 * base_scores[INTENTS]["loss"]
    assert scores["rougeL"] > base_scores[INTENTS]["rougeL"]


@pytest.mark.xdist_group(TOGETHER["sparse"])
def test_a_merge_of_two_sparse_experts_keeps_both_tasks(run, base_scores, monkeypatch):
    library = run.place / "library"  # type: ignore[attr-defined]
    names = [f"{task}-sparse" for task in (INTENTS, BANKING)]
    for task, name in zip((INTENTS, BANKING), names, strict=True):
        if not (library / name).exists():
            train(run, "sparse", task)
    monkeypatch.chdir(library.parent)
    experts = ["--experts", f"[library/{names[0]}, library/{names[1]}]"]
    assert main(["merge", *experts, "--method", "SparseAverage", "--out", "library/both"]) == 0
    assert main(["verify", "library"]) == 0
    assert set(Library(library)) >= {*names, "both"}
    kept = [sum(open_expert(library / name).kept_entries().values()) for name in (*names, "both")]
    assert max(kept[:2]) < kept[2] < sum(kept[:2])
    scores = run("test", [INTENTS, BANKING], "--model.applied", "[library/both]")
    for task in (INTENTS, BANKING):
        assert scores[task]["loss"] < 0.7 * base_scores[task]["loss"]


@pytest.mark.parametrize("case", ["LORA, use_dora", "LOHA", "OFT", "VERA"])
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_of_peft_moves_a_real_model_as_peft_does(case: str, smollm2: Path, tmp_path: Path) -> None:
    """In the first and the last block; `docs/reference/peft-types.md` has the differences."""
    where = r".*\.(0|29)\.(self_attn\.q_proj|mlp\.down_proj)"
    adapter = make_adapter(case, smollm2, tmp_path / "adapter", target_modules=where)
    expert = import_expert(adapter, tmp_path / "library/expert")
    model = Base.open(smollm2).load()
    before, expected = logits(model), peft_logits(smollm2, adapter)
    with applied(model, [expert]):
        apart = float((expected - logits(model)).abs().max() / (expected - before).abs().max())
    print(f"{case}: {apart:.0e} of the largest change of a logit")
    assert apart < 1e-3
