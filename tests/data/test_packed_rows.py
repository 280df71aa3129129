"""Packed rows lose nothing and do not meet; `fit` packs by itself where padding is more than little."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, GROUPED, build_model, build_tokenizer, write_rows
from hypothesis import given
from hypothesis import strategies as st
from testbed import runs
from transformers import BloomConfig, BloomForCausalLM

from modular_experts.data import Task, TaskMixture
from modular_experts.data.batch import IGNORED, Collator, Example, packs
from modular_experts.data.row_tokenizer import RowTokenizer
from modular_experts.data.rows import Row
from modular_experts.evaluation import batch_losses, check_packing
from modular_experts.evaluation.likelihood import keeps_rows_apart
from modular_experts.experts import LoRAExpert


def examples(*rows: Row) -> list[Example]:
    return RowTokenizer(build_tokenizer())("t", rows)[0]


ROWS = [Row("a longer input", "one"), Row("b", "two three"), Row("c d", "x")]
ROWS += [Row("some more of it", "y z"), Row("e", "f")]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(40, 200))
def test_each_row_is_in_one_pack_and_packs_keep_to_their_length(lengths: list[int], longest: int) -> None:
    found = packs(lengths, longest)
    assert sorted(row for pack in found for row in pack) == list(range(len(lengths)))
    widths = [sum(lengths[row] for row in pack) for pack in found]
    assert max(widths) <= longest
    assert len(found) * max(widths) <= len(lengths) * max(lengths), "never more padding than without packs"


def test_packs_are_no_longer_than_little_padding_takes() -> None:
    assert [len(packs([10] * 8, 1000)), len(packs([10, 30] * 4, 1000)), len(packs([10, 30] * 4, 50))] == [8, 4, 4]
    assert packs([7], 5) == [[0]]


def test_a_packed_batch_holds_the_rows_of_the_padded_one() -> None:
    rows = examples(*ROWS)
    padded, packed = Collator(0, texts=False)(rows), Collator(0, texts=False, pack_length=60)(rows)
    assert set(packed) == {"input_ids", "position_ids", "labels", "row", "task"}
    assert packed["task"] == padded["task"]
    assert len(packed["input_ids"]) < len(rows)
    for number, example in enumerate(rows):
        mine, length = packed["row"] == number, len(example.tokens.ids)
        for key in ("input_ids", "labels"):
            assert packed[key][mine].tolist() == padded[key][number, :length].tolist()
        assert packed["position_ids"][mine].tolist() == list(range(length))
    padding = packed["row"] == -1
    assert padding.any()
    assert (packed["labels"][padding | (packed["position_ids"] == 0)] == IGNORED).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_of_packed_rows_are_those_of_padded_ones(architecture: str, attention: str) -> None:
    model, rows = build_model(architecture, attn_implementation=attention).double(), examples(*ROWS)
    gradients, found = [], []
    for collate in (Collator(0, texts=False), Collator(0, texts=False, pack_length=200)):
        model.zero_grad()
        sums, counts = batch_losses(model, collate(rows))
        (sums.sum() / counts.sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        found.append((sums.detach(), counts))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-13, atol=0)
    assert torch.equal(found[1][1], found[0][1])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-15)
    assert len(Collator(0, texts=False, pack_length=200)(rows)["row"]) < len(rows)
    check_packing(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Opt", "Bloom"])
def test_models_that_mix_packed_rows_are_refused(kind: str, dtype: torch.dtype) -> None:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    small: dict[str, Any] = tokens | {"vocab_size": 98, "hidden_size": 32}
    if kind == "Opt":  # counts positions by the mask
        more = {"ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
        config: Any = transformers.OPTConfig(**small, **more)
    else:  # has no positions
        config = transformers.BloomConfig(**small, n_layer=2, n_head=4)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()
    with pytest.raises(ValueError, match=f"packing=True: {type(model).__name__} does not keep packed rows apart"):
        check_packing(model)
    assert model.training


def test_a_window_of_attention_slides_within_a_row() -> None:
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=4)).double()
    rows = examples(*ROWS)
    wanted, _ = batch_losses(model, Collator(0, texts=False)(rows))
    found, _ = batch_losses(model, Collator(0, texts=False, pack_length=200)(rows))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def mixture(files: dict[str, Path], **options: Any) -> TaskMixture:
    tasks = [Task(name, path=str(files[name])) for name in ("upper", "reverse", "first")]
    return TaskMixture(tasks, build_tokenizer(), batch_size=6, **options)


def test_evaluation_reads_the_longest_rows_first_unless_batches_are_limited(task_files: dict[str, Path]) -> None:
    data = mixture(task_files, eval_batch_size=5)
    data.setup()
    loaders: list[Any] = [data.val_dataloader(), data.test_dataloader()]
    for loader in loaders:
        lengths = [length for batch in loader for length in batch["attention_mask"].sum(1).tolist()]
        assert lengths == sorted(lengths, reverse=True)
        assert len(lengths) == 18
    for limit in (1, 0.2):
        data.trainer = transformers.utils.ModelOutput(  # only what is asked of a trainer
            global_rank=0, world_size=1, limit_test_batches=limit, is_global_zero=True
        )
        first = next(iter(data.test_dataloader()))
        assert first["task"] == ["upper", "reverse", "first", "upper", "reverse"]


def mixture_of_one_task(place: Path, longest: int, tokenizer: Any = None, **options: Any) -> TaskMixture:
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
def test_the_choice_is_by_padding_and_model_unless_it_is_set(setting: bool | None, longest, apart, tmp_path, caplog):
    data = mixture_of_one_task(tmp_path, longest, packing=setting)
    data.setup("fit")
    loader = data.train_dataloader()
    assert is_packed(data) == bool(setting), "outside of a fit nobody has seen the model"
    with caplog.at_level(logging.INFO):
        data.choose_packing(lambda: apart)
    wanted = (longest == 19 and apart) if setting is None else setting
    assert (is_packed(data), "row" in next(iter(loader))) == (wanted, wanted)
    assert ("rows are packed, which leaves" in caplog.text) == (wanted and setting is None)
    # Each choice counts anew.
    data.choose_packing(lambda: False)
    assert is_packed(data) == bool(setting)


def test_a_fit_packs_without_being_asked_unless_the_base_mixes_rows(tiny_llama_dir, tmp_path) -> None:
    data = mixture_of_one_task(tmp_path, 19)
    runs.trainer(tmp_path, max_steps=2).fit(runs.module(tiny_llama_dir, LoRAExpert), data)
    assert data.packed
    model = BloomForCausalLM(BloomConfig(vocab_size=98, hidden_size=32, n_layer=1, n_head=4))
    assert not keeps_rows_apart(model)
    base = tmp_path / "bloom"
    model.save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    runs.trainer(tmp_path, max_steps=2).fit(runs.module(base, LoRAExpert, modules="query_key_value"), data)
    assert not data.packed
