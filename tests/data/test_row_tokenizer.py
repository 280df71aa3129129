"""Tokens as one would write them by hand: prompt, joint, target, end."""

from conftest import CHARACTERS, build_tokenizer

from modular_experts.data.batch import IGNORED, Collator, Example, ExampleSet, is_filler, prompts_of
from modular_experts.data.row_tokenizer import RowTokenizer, as_continuation
from modular_experts.data.rows import Row

EOS = 1


def ids(text: str) -> list[int]:
    """Token ids by hand: three special tokens come before the characters."""
    return [3 + CHARACTERS.index(character) for character in text]


def tokenized(*rows: Row, **options: object) -> list[Example]:
    examples, _, problems = RowTokenizer(build_tokenizer(), **options)("t", rows)  # type: ignore[arg-type]
    assert problems == []
    return examples


def test_one_space_joins_unless_white_space_is_there() -> None:
    without = [("a ", "b", "b"), ("a\n", "b", "b"), ("a", " b", " b"), ("a", "\nb", "\nb")]
    for prompt, target, end in [("a", "b", " b"), ("a:", "b c", " b c"), *without]:
        assert as_continuation(prompt, target) == end
        (example,) = tokenized(Row(prompt, target))
        assert example.tokens.ids.tolist() == ids(prompt) + ids(end) + [EOS]
        assert example.tokens.prompt == len(prompt)


def test_no_special_token_is_added_even_by_a_tokenizer_that_would() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    assert tokenizer("a")["input_ids"] == [2, *ids("a")]
    assert RowTokenizer(tokenizer)("t", [Row("a", "b")])[0][0].tokens.ids.tolist() == [*ids("a b"), EOS]


def test_a_batch_by_hand() -> None:
    batch = Collator(pad_id=0)(tokenized(Row("ab", "c"), Row("a", "bcd")))
    assert batch["input_ids"].tolist() == [[*ids("ab c"), EOS, 0], [*ids("a bcd"), EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    x = IGNORED
    assert batch["labels"].tolist() == [[x, x, *ids(" c"), EOS, x], [x, *ids(" bcd"), EOS]]
    assert (batch["task"], batch["input"], batch["target"]) == (["t", "t"], ["ab", "a"], ["c", "bcd"])
    assert [prompt.tolist() for prompt in prompts_of(batch)] == [ids("ab"), ids("a")]
    without_texts = Collator(pad_id=0, texts=False)(tokenized(Row("a", "b")))
    assert set(without_texts) == {"input_ids", "attention_mask", "labels", "task"}


def test_the_end_is_learned_although_it_is_also_the_padding() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenize = RowTokenizer(tokenizer)
    assert tokenize.pad_id == EOS
    batch = Collator(tokenize.pad_id)(tokenize("t", [Row("a", "b"), Row("a", "bcd")])[0])
    assert batch["labels"][0].tolist() == [IGNORED, *ids(" b"), EOS, IGNORED, IGNORED]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 0, 0]
    # Without a padding token the end pads, and the tokenizer stays as it was.
    tokenizer.pad_token = None
    assert RowTokenizer(tokenizer).pad_id == EOS
    assert tokenizer.pad_token is None


def test_a_long_row_loses_the_left_of_its_input_and_keeps_its_target() -> None:
    examples, cut, _ = RowTokenizer(build_tokenizer(), max_length=6)("t", [Row("abcdef", "xy"), Row("ab", "xy")])
    assert [example.tokens.ids.tolist() for example in examples] == [[*ids("ef xy"), EOS], [*ids("ab xy"), EOS]]
    assert cut == 1
    assert examples[0].input == "abcdef"
    # A row to predict has an input alone, which may end in white space.
    (example,) = tokenized(Row("ab ", None))
    assert (example.tokens.ids.tolist(), example.tokens.prompt) == (ids("ab "), 3)
    # A target that leaves no room is a bad row.
    rows = [Row("a", "xyz", where="f:3"), Row("a", "xy")]
    examples, _, problems = RowTokenizer(build_tokenizer(), max_length=5)("t", rows)
    assert len(examples) == 1
    assert problems == ["f:3: the target or a choice fills max_length=5; raise it"]


def test_choices_share_the_prompt_and_are_marked() -> None:
    rows = Row("abcdef", "x", choices=("xyz", "x")), Row("ab", "y"), Row("ab", "z", choices=("z", "x"))
    batch = Collator(pad_id=0)(tokenized(*rows, max_length=7))
    choices = batch["choices"]
    assert choices["input_ids"].tolist() == [
        [*ids("ef xyz"), EOS],
        [*ids("ef x"), EOS, 0, 0],
        [*ids("ab z"), EOS, 0, 0],
        [*ids("ab x"), EOS, 0, 0],
    ]
    assert choices["row"].tolist() == [0, 0, 2, 2]
    assert choices["correct"].tolist() == [False, True, True, False]
    assert choices["labels"][1].tolist() == [IGNORED, IGNORED, *ids(" x"), EOS, IGNORED, IGNORED]
    assert batch["input_ids"][0].tolist() == [*ids("ef x"), EOS]


def test_a_chat_template_renders_the_prompt() -> None:
    tokenizer = build_tokenizer()
    messages, prompt = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", "[bot]\n"
    tokenizer.chat_template = f"{messages}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    (example,) = RowTokenizer(tokenizer, chat_template=True)("t", [Row("hi", "yo")])[0]
    assert example.tokens.ids.tolist() == [*ids("[user]hi[bot]\nyo"), EOS]
    assert example.tokens.prompt == len("[user]hi[bot]\n")
    assert example.input == "hi"


def test_a_filler_has_no_task_and_no_labels() -> None:
    examples = ExampleSet(tokenized(Row("ab", "c", choices=("c", "d")), Row("a", "b")))
    batch = Collator(pad_id=0)([examples[1], examples[-1]])
    assert is_filler(batch) == [False, True]
    assert (batch["labels"][1] == IGNORED).all()
    assert "choices" not in batch
