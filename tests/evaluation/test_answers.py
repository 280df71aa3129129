"""An expert's answers stand where targets would, and rows that they make too long are cut as rows with targets are."""

import pytest
from conftest import build_model, build_tokenizer
from test_generation import greedily

from modular_experts.data.batch import Collator
from modular_experts.data.rows import Row
from modular_experts.data.tokenize import RowTokenizer
from modular_experts.evaluation import answered

TEXTS = ["reverse bat:", "a longer prompt:"]  # 12 and 16 tokens


@pytest.mark.parametrize("longest", [1024, 90, 70, 64, 26, 20, 16])
def test_an_answer_is_that_to_the_whole_prompt_at_any_length_of_rows(longest: int, caplog) -> None:
    model, tokenizer = build_model("gpt2", seed=3), build_tokenizer()
    for parameter in model.parameters():
        parameter.data.mul_(4) if parameter.ndim > 1 else None
    examples = RowTokenizer(tokenizer, max_length=longest)("t", [Row(text, None) for text in TEXTS])[0]
    found = answered(model, tokenizer, examples, Collator(pad_id=0), 2, longest, max_new_tokens=8)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    answers = [tokenizer(greedily(model, text, 8))["input_ids"] for text in TEXTS]
    whole = [(prompt + answer)[-longest:] for prompt, answer in zip(ids, answers, strict=True)]
    assert [row.tokens.ids.tolist() for row in found] == whole
    assert [row.tokens.ids[row.tokens.prompt :].tolist() for row in found] == answers
    shortened = [len(prompt) + 8 > longest for prompt in ids]
    sentence = f"{sum(shortened)} of 2 rows are longer than {longest} tokens with their answers and lost their start"
    assert [record.getMessage() for record in caplog.records] == [sentence] * any(shortened)
