"""Without a setting, a fit packs rows where padding is much and the model keeps rows apart, and its loaders follow."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tokenizer, write_rows
from lightning.pytorch import seed_everything
from testbed import runs
from transformers import BloomConfig, BloomForCausalLM

from modular_experts.data import Task, TaskMixture
from modular_experts.evaluation.likelihood import keeps_rows_apart
from modular_experts.experts import LoRAExpert


def mixture(place: Path, longest: int, tokenizer: Any = None, **options: Any) -> TaskMixture:
    """Return a task of 24 rows whose inputs have 1 to `longest` tokens."""
    rows = [{"input": "x" * (1 + number % longest), "target": "ab", "split": "train"} for number in range(24)]
    rows.append({"input": "x", "target": "ab", "split": "validation"})
    file = write_rows(place / "uneven.jsonl", rows)
    return TaskMixture([Task("uneven", path=str(file))], tokenizer or build_tokenizer(), batch_size=6, **options)


def is_packed(data: TaskMixture) -> bool:
    return all("row" in batch for batch in data.train_dataloader())


@pytest.mark.parametrize("setting", [None, False, True])
@pytest.mark.parametrize("longest", [1, 19])
@pytest.mark.parametrize("apart", [False, True])
def test_the_choice_is_by_padding_and_model_unless_it_is_set(
    setting: bool | None, longest: int, apart: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = mixture(tmp_path, longest, packing=setting)
    data.setup("fit")
    loader = data.train_dataloader()
    with caplog.at_level(logging.INFO):
        data.choose_packing(lambda: apart)
    wanted = (longest == 19 and apart) if setting is None else setting
    assert (is_packed(data), "row" in next(iter(loader))) == (wanted, wanted)
    assert ("rows are packed, which leaves" in caplog.text) == (wanted and setting is None)


def test_each_choice_counts_anew(tmp_path: Path) -> None:
    data = mixture(tmp_path, 19)
    data.setup("fit")
    assert not is_packed(data), "outside of a fit nobody has seen the model"
    data.choose_packing(lambda: True)
    assert is_packed(data)
    data.choose_packing(lambda: False)
    assert not is_packed(data)


def test_a_fit_packs_without_being_asked_and_trains_the_same(tiny_llama_dir, tmp_path) -> None:
    seen = []
    for packing in (None, False):
        seed_everything(0, verbose=False)
        losses, data = runs.Losses(), mixture(tmp_path, 19, packing=packing)
        runs.trainer(tmp_path, losses, max_steps=4).fit(runs.module(tiny_llama_dir, LoRAExpert, dtype="float64"), data)
        assert data.packed == (packing is None)
        seen.append(losses.steps)
    assert seen[0] == pytest.approx(seen[1], rel=1e-12)


def test_a_base_that_mixes_rows_is_trained_on_padded_ones(tmp_path) -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=98, hidden_size=32, n_layer=1, n_head=4))
    assert not keeps_rows_apart(model)
    base = tmp_path / "bloom"
    model.save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    data = mixture(tmp_path, 19)
    runs.trainer(tmp_path, max_steps=2).fit(runs.module(base, LoRAExpert, modules="query_key_value"), data)
    assert not data.packed
