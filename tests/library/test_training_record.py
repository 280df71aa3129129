"""What records tell of a training: what a merge takes over, and what is said where an expert is used otherwise."""

import logging
from pathlib import Path

import pytest
import torch

from modular_experts.deltas import Dense
from modular_experts.library import make_record, open_expert, warn_unlike_training, write_expert
from modular_experts.library.expert import StoredExpert
from modular_experts.merging.merged import merge

READ = {"max_length": 512, "chat_template": "abc", "dtype": "float32"}


def _expert(folder: Path, name: str, training: dict | None) -> StoredExpert:
    record = make_record("LoRAExpert", {"id": "base", "fingerprint": "f"}, training=training)
    write_expert(folder / name, {"w.weight": Dense(torch.ones(2, 3))}.items(), record)
    return open_expert(folder / name)


def test_a_merge_has_what_its_parents_have_in_common(tmp_path) -> None:
    a, b = _expert(tmp_path, "a", READ | {"rows": 8}), _expert(tmp_path, "b", READ | {"max_length": 256})
    old = _expert(tmp_path, "old", None)
    assert "training" not in old.record, "earlier versions wrote no such part"
    both = merge([a, b], "Average", tmp_path / "both")
    assert both.record["training"] == {"chat_template": "abc", "dtype": "float32"}
    assert "training" not in merge([a, old], "Average", tmp_path / "mixed").record


@pytest.mark.parametrize(
    ("trained", "now", "said"),
    [
        (READ, READ, ""),
        (READ, READ | {"max_length": 600}, ""),
        (READ, READ | {"max_length": 100}, "100 instead of 512 tokens a row (`max_length=`)"),
        (READ, READ | {"chat_template": None}, "no chat template instead of one (`chat_template=True`)"),
        (READ, READ | {"chat_template": "xyz"}, "another chat template"),
        (READ | {"chat_template": None}, READ, "a chat template, which it never saw (`chat_template=True`)"),
        (READ, READ | {"dtype": "bfloat16"}, "a base in bfloat16 instead of float32 (`dtype=`)"),
        (None, READ | {"dtype": "bfloat16"}, ""),
        (READ, {"dtype": "float32"}, ""),
    ],
)
def test_another_use_than_in_training_gets_a_sentence(tmp_path, caplog, trained, now, said) -> None:
    caplog.set_level(logging.WARNING, "modular_experts")
    reading = {key: value for key, value in now.items() if key != "dtype"}
    warn_unlike_training([_expert(tmp_path, "mine", trained)], lambda tasks: reading, now["dtype"])
    start = "mine is used otherwise than it was trained, with "
    assert caplog.messages == ([start + said] if said else [])
