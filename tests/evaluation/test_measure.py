"""Measuring without a trainer gives what `Trainer.test` gives, and one pass tells what greedy decoding would write."""

from __future__ import annotations

import torch
from conftest import write_rows
from testbed.runs import mixture, module, trainer

from modular_experts.base import Base
from modular_experts.data.batch import Collator
from modular_experts.data.rows import Row
from modular_experts.data.tokenize import RowTokenizer
from modular_experts.evaluation import generate, greedy_matches, measure


def test_measure_gives_the_results_of_a_test(tiny_llama_dir, task_files, tmp_path) -> None:
    tested = module(tiny_llama_dir, None, max_new_tokens=6)
    trainer(tmp_path).test(tested, mixture(task_files, tiny_llama_dir), verbose=False)
    data = mixture(task_files, tiny_llama_dir)
    data.setup("test")
    model, tokenizer = Base.open(tiny_llama_dir).load(), Base.open(tiny_llama_dir).tokenizer()
    found = measure(model.train(), tokenizer, data.test_dataloader(), data.roles, max_new_tokens=6)
    assert found == {key: value for key, value in tested.results.items() if key != "model"}
    assert model.training


def test_without_generation_there_is_only_the_loss(tiny_llama_dir, task_files) -> None:
    data = mixture(task_files, tiny_llama_dir)
    data.setup("test")
    model, tokenizer = Base.open(tiny_llama_dir).load(), Base.open(tiny_llama_dir).tokenizer()
    found = measure(model, tokenizer, data.test_dataloader(), data.roles, max_new_tokens=None)
    assert set(found["tasks"]["upper"]) == {"role", "rows", "loss"}


def test_greedy_matches_are_the_rows_that_generation_writes(tiny_llama_dir) -> None:
    """Targets of two kinds: what the model writes itself when its end-of-sequence is made likely, and other text."""
    model, tokenizer = Base.open(tiny_llama_dir).load(), Base.open(tiny_llama_dir).tokenizer()
    batch_of = Collator(0)
    prompts = [f"ask {letter}:" for letter in "abcdefgh"]
    rows = [Row(prompt, "x", None, (), "here") for prompt in prompts]
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # far-apart logits: no ties between two passes of another shape
    first = batch_of(RowTokenizer(tokenizer)("t", rows)[0])
    written = generate(model, tokenizer, first, max_new_tokens=1)
    rows = [Row(prompt, text or "x", None, (), "here") for prompt, text in zip(prompts, written, strict=True)]
    batch = batch_of(RowTokenizer(tokenizer)("t", rows)[0])
    found = greedy_matches(model, batch)
    longer = generate(model, tokenizer, batch, max_new_tokens=2)
    assert found.tolist() == [made == row.target for made, row in zip(longer, rows, strict=True)]


def test_kept_examples_are_the_first_rows_of_a_task_in_whatever_order_batches_come(tiny_llama_dir, tmp_path) -> None:
    lengths = [2, 9, 4, 1]
    rows = [{"input": "x" * length, "target": "y", "split": "test"} for length in lengths]
    data = mixture({"a": write_rows(tmp_path / "a.jsonl", rows)}, tiny_llama_dir, eval_batch_size=1)
    data.setup("test")
    model, tokenizer = Base.open(tiny_llama_dir).load(), Base.open(tiny_llama_dir).tokenizer()
    found = measure(model, tokenizer, data.test_dataloader(), data.roles, max_new_tokens=1, examples=2)
    assert [len(row["input"]) for row in found["examples"]["a"]] == lengths[:2]
