"""Forgetting is the rise of the loss on texts above the base's, over the tokens behind each piece's first ones."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CHARACTERS, build_tokenizer
from testbed.random_deltas import random_delta
from testbed.runs import mixture

from modular_experts import evaluate
from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.evaluation.forgetting import PROMPT, Texts, forgotten
from modular_experts.library import make_record, open_expert, write_expert


@pytest.fixture
def texts(tiny_llama_dir, tmp_path, monkeypatch) -> str:
    """Write a library with an expert that moves a weight far, and a file of 700 characters, which are tokens."""
    monkeypatch.chdir(tmp_path)
    name, weight = next((n, w) for n, w in Base.open(tiny_llama_dir).load().named_parameters() if "q_proj" in n)
    record = make_record("X", {"id": str(tiny_llama_dir), "fingerprint": fingerprint(tiny_llama_dir)})
    write_expert("library/a", [(name, 3 * random_delta("Sparse", weight.shape, 1, torch.float32, share=0.5))], record)
    Path("texts.txt").write_text("".join(random.Random(0).choices(CHARACTERS, k=700)))
    return "texts.txt"


def by_hand(model: torch.nn.Module, ids: torch.Tensor, length: int) -> tuple[float, int]:
    """Return the summed loss in float64, piece by piece, and the number of tokens."""
    total, count = 0.0, 0
    for piece in ids.split(length):
        if len(piece) <= PROMPT:
            continue
        with torch.no_grad():
            logits = model.double()(piece[None].long()).logits[0, PROMPT - 1 : -1]
        total += float(F.cross_entropy(logits, piece[PROMPT:].long(), reduction="sum"))
        count += len(piece) - PROMPT
    return total, count


def test_the_rise_is_that_of_the_loss_by_hand(tiny_llama_dir, task_files, texts) -> None:
    models = {"base": [], "a": "library/a"}
    found = evaluate(tiny_llama_dir, models, mixture(task_files, tiny_llama_dir), None, forgetting=texts)
    facts = found.facts["forgetting"]
    opened = Base.open(tiny_llama_dir)
    ids = torch.tensor(build_tokenizer()(Path(texts).read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    length = min(512, opened.load().config.max_position_embeddings)
    base, count = by_hand(opened.load(), ids, length)
    moved = opened.load()
    for name, delta in open_expert("library/a").items():
        moved.get_parameter(name).data += delta.dense()
    after, _ = by_hand(moved, ids, length)
    assert facts["tokens"] == count
    assert facts["models"]["base"] == {"loss": pytest.approx(base / count, rel=1e-5), "rise": 0.0, "interval": [0, 0]}
    assert facts["models"]["a"]["loss"] == pytest.approx(after / count, rel=1e-5)
    assert facts["models"]["a"]["rise"] == pytest.approx((after - base) / count, abs=1e-5)
    assert abs(after - base) / count > 1e-4
    low, high = facts["models"]["a"]["interval"]
    assert low <= facts["models"]["a"]["rise"] <= high


def test_the_command_prints_it_and_goes_on_and_other_texts_are_measured_anew(
    tiny_llama_dir, task_files, texts, run, monkeypatch
) -> None:
    words = ["evaluate", "--base", str(tiny_llama_dir), "--experts", "library/a", "--tasks", str(task_files["upper"])]
    words += ["--max_new_tokens", "1", "--out", "runs/a", "--overwrite", "--forgetting"]
    shown = run(*words, texts)[1]
    assert "loss on texts.txt" in shown
    assert "What the models forget" in Path("runs/a/report.html").read_text()
    before = json.loads(Path("runs/a/results.json").read_text())["facts"]["forgetting"]
    measured = []
    losses = Texts.losses
    monkeypatch.setattr(Texts, "losses", lambda self, model, rows=8: measured.append(1) or losses(self, model, rows))
    assert run(*words, texts)[1] == shown
    assert json.loads(Path("runs/a/results.json").read_text())["facts"]["forgetting"] == before
    assert measured == []
    Path("other.txt").write_text(Path(texts).read_text()[::-1])
    assert "loss on other.txt" in run(*words, "other.txt")[1]
    assert len(measured) == 2


def test_bad_texts_get_a_sentence(tiny_llama_dir, task_files, texts) -> None:
    data = mixture(task_files, tiny_llama_dir)
    with pytest.raises(ValueError, match=r"forgetting='texts.txt' compares with the base; add {'base': \[\]}"):
        evaluate(tiny_llama_dir, "library/a", data, None, forgetting=texts)
    Path("short.txt").write_text("abc")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="has 3 tokens; give texts of more than 64"):
        evaluate(tiny_llama_dir, {"base": []}, data, None, forgetting="short.txt")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        evaluate(tiny_llama_dir, {"base": []}, data, None, forgetting="binary.txt")
    with pytest.raises(FileNotFoundError, match=r"'none\.txt' is not a file"):
        evaluate(tiny_llama_dir, {"base": []}, data, None, forgetting="none.txt")


def test_means_weigh_tokens() -> None:
    texts = Texts(Path("t"), torch.zeros(1, dtype=torch.int32), 0)
    facts = forgotten(texts, {"base": [(10.0, 10), (2.0, 1)], "m": [(20.0, 10), (3.0, 1)]}, "base")
    assert facts["models"]["m"]["rise"] == pytest.approx(1.0)
    assert facts["models"]["m"]["loss"] == pytest.approx(23 / 11)
