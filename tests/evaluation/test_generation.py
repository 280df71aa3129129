"""A batch generates the answers that each prompt alone would get, and nobody's settings change."""

from typing import Any

import pytest
import torch
from conftest import build_model, build_tokenizer
from transformers import GenerationConfig

from modular_experts.data.batch import Collator
from modular_experts.data.row_tokenizer import RowTokenizer
from modular_experts.data.rows import Row
from modular_experts.evaluation import answered, generate_texts, measure

TEXTS = ["a", "reverse bat:", "a longer prompt than the others, by far:"]


def decided(architecture: str, **changes: Any) -> Any:
    """Return a model with larger weights: a random model of the usual size repeats one token."""
    model = build_model(architecture, seed=3, **changes)
    for parameter in model.parameters():
        parameter.data.mul_(4) if parameter.ndim > 1 else None
    return model


def batch_of(texts: list[str]) -> dict[str, Any]:
    return Collator(pad_id=0)(RowTokenizer(build_tokenizer())("t", [Row(text, "target") for text in texts])[0])


def greedily(model: torch.nn.Module, text: str, steps: int) -> str:
    """Decode alone, without padding or cache, from the definition."""
    tokenizer = build_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    written: list[int] = []
    while len(written) < steps:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    return tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])  # three ways to count positions
def test_a_padded_batch_equals_each_prompt_alone(architecture: str) -> None:
    model = decided(architecture)
    alone = [greedily(model, text, 12) for text in TEXTS]
    assert len(set(alone)) == 3
    assert generate_texts(model, build_tokenizer(), batch_of(TEXTS), max_new_tokens=12) == alone


def test_a_row_stops_at_its_end_while_others_go_on() -> None:
    model, tokenizer = build_model("llama"), build_tokenizer()
    eos, letter = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("z")

    def forward(self: torch.nn.Module, arguments: Any, keywords: Any, output: Any) -> Any:
        """End at once after an "e", and write "z" for ever after anything else."""
        output.logits[:] = 0.0
        last = keywords["input_ids"][:, -1] == tokenizer.convert_tokens_to_ids("e")
        output.logits[:, -1, eos] = torch.where(last, 9.0, 0.0)
        output.logits[:, -1, letter] = 5.0
        return output

    model.register_forward_hook(forward, with_kwargs=True)
    assert generate_texts(model, tokenizer, batch_of(["the e", "abc"]), max_new_tokens=4) == ["", "zzzz"]


def test_settings_of_the_checkpoint_do_not_reach_the_measurement() -> None:
    model, tokenizer = build_model("llama", seed=3), build_tokenizer()
    plain = generate_texts(model, tokenizer, batch_of(TEXTS), max_new_tokens=12)
    own = GenerationConfig(
        repetition_penalty=50.0, do_sample=True, temperature=9.0, max_length=3, eos_token_id=5, num_beams=2
    )
    model.generation_config = own
    before, side = own.to_dict(), tokenizer.padding_side
    model.train()
    assert generate_texts(model, tokenizer, batch_of(TEXTS), max_new_tokens=12) == plain
    assert model.generation_config is own
    assert own.to_dict() == before
    assert model.training
    assert tokenizer.padding_side == side


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_an_answer_gives_way_before_its_prompt(architecture: str, caplog) -> None:
    context, most = 24, 10
    model, tokenizer = decided(architecture, max_position_embeddings=context), build_tokenizer()
    alphabet = "".join(map(chr, range(ord("a"), ord("z") + 1)))
    texts = [(alphabet + "0123456789")[:length] for length in (3, 14, 15, 20, 23, 24, 36)]
    rooms = [10, 10, 9, 4, 1, 1, 1]
    wanted = [greedily(model, text[-23:], room) for text, room in zip(texts, rooms, strict=True)]
    # The model reads the start of a prompt.
    assert wanted[3] != greedily(model, texts[3][1:], 4)
    assert generate_texts(model, tokenizer, batch_of(texts), most) == wanted
    rows = RowTokenizer(tokenizer, context=context)("t", [Row(text, "z") for text in texts[:5]])[0]
    roles, batches = {"t": "held_in"}, [Collator(pad_id=0)(rows), Collator(pad_id=0)(rows[1:2])]
    measure(model, tokenizer, batches, roles, most)
    # None of these answers ends by itself.
    assert list(map(len, wanted)) == rooms
    (record,) = caplog.records
    assert record.getMessage() == (
        "t: 3 of 6 answers ended where the model's context of 24 tokens does, before max_new_tokens=10; shorten their "
        "prompts, which a lower max_length does as well"
    )


def test_all_is_as_before_when_generation_fails_or_there_is_no_head_to_be_found(monkeypatch) -> None:
    model = build_model("llama").train()
    own = model.generation_config
    wanted = generate_texts(model, build_tokenizer(), batch_of(TEXTS), max_new_tokens=2)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert generate_texts(model, build_tokenizer(), batch_of(TEXTS), max_new_tokens=2) == wanted
    for broken in ("get_output_embeddings", "generate"):
        monkeypatch.undo()
        monkeypatch.setattr(model, broken, lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate_texts(model, build_tokenizer(), batch_of(TEXTS), max_new_tokens=2)
        assert model.training
        assert model.generation_config is own
        assert not model.lm_head._forward_pre_hooks


SHORT = ["reverse bat:", "a longer prompt:"]  # 12 and 16 tokens


@pytest.mark.parametrize("longest", [1024, 90, 70, 64, 26, 20, 16])
def test_an_answer_is_that_to_the_whole_prompt_at_any_length_of_rows(longest: int, caplog) -> None:
    model, tokenizer = decided("gpt2"), build_tokenizer()
    examples = RowTokenizer(tokenizer, max_length=longest)("t", [Row(text, None) for text in SHORT])[0]
    found = answered(model, tokenizer, examples, Collator(pad_id=0), 2, longest, max_new_tokens=8)
    ids = [tokenizer(text)["input_ids"] for text in SHORT]
    answers = [tokenizer(greedily(model, text, 8))["input_ids"] for text in SHORT]
    whole = [(prompt + answer)[-longest:] for prompt, answer in zip(ids, answers, strict=True)]
    assert [row.tokens.ids.tolist() for row in found] == whole
    assert [row.tokens.ids[row.tokens.prompt :].tolist() for row in found] == answers
    shortened = [len(prompt) + 8 > longest for prompt in ids]
    sentence = f"{sum(shortened)} of 2 rows are longer than {longest} tokens with their answers and lost their start"
    assert [record.getMessage() for record in caplog.records] == [sentence] * any(shortened)
