"""One pass with targets as drafts gives the losses and answers of padded rows, and reads no padding."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from conftest import GROUPED, build_model, build_tokenizer

from modular_experts.data.batch import IGNORED, Collator, Example, ExampleSet, Tokens
from modular_experts.data.row_tokenizer import RowTokenizer
from modular_experts.data.rows import Row
from modular_experts.deltas import Dense
from modular_experts.evaluation import (
    TaskScores,
    batch_losses,
    choice_log_likelihoods,
    generate_texts,
    generate_tokens,
    score_batch,
)
from modular_experts.evaluation.drafts import choices_behind_prompts, losses_and_answers, packs_evaluation
from modular_experts.experts import LoRAExpert
from modular_experts.injection import find_sites, inject, moves_tokens_alone
from modular_experts.injection.routed import routed
from modular_experts.routing import Energy, Oracle, Router, Softmax, TopK

STEPS = 8
PROMPTS = ["a", "reverse bat:", "a longer prompt than the others, by far:", "upper dog:", "x y z", "first: q"]
SLIDING = {"sliding_window": 6, "max_window_layers": 1, "use_sliding_window": True}
MODELS = {
    "llama": partial(build_model, "llama", seed=3),
    "gpt2": partial(build_model, "gpt2", seed=3),
    "neox": partial(build_model, "neox", seed=3),
    "sliding windows": partial(build_model, "qwen2", seed=3, **SLIDING),
    "soft caps": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6, attn_implementation="eager")
    ),
}


def decided(name: str, **changes: Any) -> Any:
    """Return a model whose logits lie far apart: a random model of the usual size repeats one token."""
    torch.manual_seed(0)
    model = MODELS[name](**changes).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4) if parameter.ndim > 1 else None
    return model


def drafts_of(model: Any, tokenizer: Any) -> list[Example]:
    """Rows whose targets are the model's own answer, its beginning, one with a slip in its middle, and other text."""
    blank, _, _ = RowTokenizer(tokenizer)("t", [Row(prompt, "target") for prompt in PROMPTS])
    written = generate_tokens(model, tokenizer, Collator(pad_id=0)(blank), STEPS)
    slip = [written[2][0], (written[2][1] + 1) % 90 + 3, *written[2][2:]]
    targets = [written[0], written[1][:3], slip, [5, 6, 7, 1], written[4] + [9, 9, 9], [*written[5][:2], 1]]

    def with_target(one: Example, target: list[int]) -> Example:
        prompt = one.tokens.ids[: one.tokens.prompt]
        return replace(one, tokens=Tokens(torch.cat([prompt, prompt.new_tensor(target)]), len(prompt)))

    return [with_target(one, target) for one, target in zip(blank, targets, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_answers_are_those_of_padded_rows(name: str) -> None:
    model, tokenizer = decided(name), build_tokenizer()
    assert packs_evaluation(model)
    rows = drafts_of(model, tokenizer)
    # One row ends at a token of its own, which it writes in the middle of its answer.
    middle = generate_tokens(model, tokenizer, Collator(pad_id=0)(rows), STEPS)[3][2]
    rows[3] = replace(rows[3], end=middle)
    batch = Collator(pad_id=0)(rows)
    (sums, counts), answers = losses_and_answers(model, tokenizer, batch, STEPS)
    wanted, numbers = batch_losses(model, batch)
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=1e-4)
    assert counts.tolist() == numbers.tolist()
    assert answers == generate_tokens(model, tokenizer, batch, STEPS)
    assert len({tuple(answer) for answer in answers}) > 3
    for most in (1, 3):
        _, short = losses_and_answers(model, tokenizer, batch, most)
        assert short == generate_tokens(model, tokenizer, batch, most)


def test_only_tokens_are_read_and_the_head_is_asked_for_labels_and_written_tokens() -> None:
    model, tokenizer = decided("llama"), build_tokenizer()
    rows = drafts_of(model, tokenizer)
    batch, read, asked = Collator(pad_id=0)(rows), [], []
    tokens, labelled = int(batch["attention_mask"].sum()), int((batch["labels"] != IGNORED).sum())
    model.register_forward_pre_hook(lambda _, __, known: read.append(known["input_ids"].numel()), with_kwargs=True)
    model.lm_head.register_forward_hook(lambda _, __, logits: asked.append(logits.shape[:-1].numel()))
    _, answers = losses_and_answers(model, tokenizer, batch, STEPS)
    # The first three, two, one and three tokens of these answers come from the draft, and all of the other two answers.
    beyond = sum(len(answers[row]) - known for row, known in ((1, 3), (2, 2), (3, 1), (5, 3)))
    assert sum(asked) == labelled + beyond
    assert sum(read[1:]) == beyond
    assert read[0] * 0.95 <= tokens <= read[0]
    assert len(read) == 1 + max(len(answer) - 1 for answer in answers)
    right = Collator(pad_id=0)([rows[0]])
    read.clear()
    losses_and_answers(model, tokenizer, right, STEPS)
    assert len(read) == 1, "a right target needs no step"


def test_a_filler_among_the_rows_gets_no_answer_and_changes_none() -> None:
    model, tokenizer = decided("llama"), build_tokenizer()
    examples = ExampleSet(drafts_of(model, tokenizer))
    alone = losses_and_answers(model, tokenizer, Collator(pad_id=0)([examples[1], examples[2]]), STEPS)[1]
    mixed = Collator(pad_id=0)([examples[1], examples[-1], examples[2]])
    assert losses_and_answers(model, tokenizer, mixed, STEPS)[1] == [alone[0], [], alone[1]]


class Drawn(Router):
    """Weighs three experts by the prompt."""

    scope = "sample"

    def learn(self, deltas, statistics):
        self.experts = len(deltas)

    def scores(self, hidden):
        return hidden @ torch.randn(hidden.shape[1], 3, generator=torch.Generator().manual_seed(1)).to(hidden)


def three_experts(model: Any) -> list[dict[str, Dense]]:
    weights = [site.weight for site in find_sites(model) if not site.by_name_only][:4]
    made = torch.Generator().manual_seed(0)
    shapes = {weight: model.get_parameter(weight).shape for weight in weights}
    return [{w: Dense(0.3 * torch.randn(shape, generator=made)) for w, shape in shapes.items()} for _ in range(3)]


ROUTED = [("llama", Drawn(TopK(1))), ("gpt2", Drawn(Softmax(0.1))), ("sliding windows", Drawn(TopK(1)))]
ROUTED += [("llama", Drawn(Softmax(0.1))), ("llama", Energy()), ("gpt2", Energy())]


@pytest.mark.parametrize(("name", "router"), ROUTED)
def test_rows_are_packed_behind_routers(name: str, router: Router) -> None:
    """Each row of a pack, and each answer that goes on, has the gates that its prompt has alone."""
    model, tokenizer = decided(name), build_tokenizer()
    is_of_prompts = isinstance(router, Drawn)
    if is_of_prompts:
        router.learn([None] * 3, [])
    with routed(model, three_experts(model), router) as found:
        assert packs_evaluation(model)
        batch = Collator(pad_id=0)(drafts_of(model, tokenizer))
        (sums, _), answers = losses_and_answers(model, tokenizer, batch, STEPS)
        torch.testing.assert_close(sums, batch_losses(model, batch)[0], rtol=1e-4, atol=1e-3)
        if is_of_prompts:
            gates = found.current.gates
            assert len(gates.ids.gather(1, gates.weights.argmax(1, keepdim=True)).unique()) > 1, "rows must differ"
            assert len({tuple(answer) for answer in answers}) > 3
        assert answers == generate_tokens(model, tokenizer, batch, STEPS)


def choices_of(tokenizer: Any, prompts: list[str]) -> Any:
    """Three choices of unlike lengths for each prompt."""
    rows = [Row(prompt, "a", choices=("a", "bcd ef", "xy")) for prompt in prompts]
    batch = Collator(pad_id=0)(RowTokenizer(tokenizer)("t", rows)[0])
    return batch["choices"] | {"task": ["t" for _ in batch["choices"]["row"]]}


@pytest.mark.parametrize("prompts", [PROMPTS[1:], PROMPTS], ids=["of several tokens", "one of a token"])
@pytest.mark.parametrize("lines", [2, 32])
@pytest.mark.parametrize("name", MODELS)
def test_choices_behind_a_prompt_that_is_read_once_are_as_likely(name: str, lines: int, prompts: list[str]) -> None:
    model = decided(name)
    choices = choices_of(build_tokenizer(), prompts)
    wanted = choice_log_likelihoods(model, choices)
    assert wanted.std() > 1
    torch.testing.assert_close(choices_behind_prompts(model, choices, lines), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("name", "router"), ROUTED)
def test_choices_behind_a_prompt_have_its_gates(name: str, router: Router) -> None:
    model = decided(name)
    if isinstance(router, Drawn):
        router.learn([None] * 3, [])
    with routed(model, three_experts(model), router):
        # A prompt of one token, at the end, fills a pass of its own.
        for prompts in (PROMPTS[1:], [*PROMPTS[1:4], "a"]):
            choices = choices_of(build_tokenizer(), prompts)
            wanted = choice_log_likelihoods(model, choices)
            torch.testing.assert_close(choices_behind_prompts(model, choices, 3), wanted, rtol=1e-4, atol=1e-3)


def test_choices_go_to_the_expert_of_their_task() -> None:
    model, tokenizer = decided("llama"), build_tokenizer()
    rows = [Row("pick", "a", choices=("a", "bcd")), Row("reverse", "c", choices=("c", "z"))]
    examples = [RowTokenizer(tokenizer)(task, [row])[0][0] for task, row in zip("st", rows, strict=True)]
    batch, experts, router = Collator(pad_id=0)(examples), three_experts(model)[:2], Oracle({"s": 0, "t": 1})
    router.learn([None] * 2, [])

    class Seen:
        def update(self, batch, sums, counts, texts, choices) -> None:
            self.choices = choices

    with routed(model, experts, rows=[0, 0, 1, 1]):
        wanted = choice_log_likelihoods(model, batch["choices"])
    with routed(model, experts, router):
        for packed in (False, True):
            score_batch(seen := Seen(), model, tokenizer, batch, None, packed)
            torch.testing.assert_close(seen.choices, wanted, rtol=1e-5, atol=1e-4)


def test_rows_are_not_packed_with_fixed_experts() -> None:
    model = decided("llama")
    with routed(model, three_experts(model), rows=[0, 1, 2]):
        assert not moves_tokens_alone(model)
        assert not packs_evaluation(model)


def test_an_expert_that_looks_at_whole_rows_and_a_model_without_positions_are_not_packed() -> None:
    class Router(LoRAExpert):
        mergeable = False

    assert not packs_evaluation(transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=32, n_head=4)))
    for kind, wanted in ((LoRAExpert, True), (Router, False)):
        model = build_model("llama")
        inject(model, lambda weight, kind=kind: kind(weight, rank=2), "q_proj")
        assert packs_evaluation(model) is wanted


def test_scores_are_the_same_with_choices_and_where_the_context_ends_answers() -> None:
    model, tokenizer = decided("gpt2", max_position_embeddings=48), build_tokenizer()
    rows = [
        Row("pick", "a", choices=("a", "bcd", "e")),
        Row("p" * 42, "z", choices=("y", "z")),
        Row("reverse", "c" * 4, choices=("c" * 4, "z")),
    ]
    batch = Collator(pad_id=0)(RowTokenizer(tokenizer, max_length=48)("t", rows)[0])
    for most in (None, 4, 16, 60):
        found = []
        for packed in (False, True):
            scores = TaskScores({"t": "held_in"})
            texts = score_batch(scores, model, tokenizer, batch, most, packed)
            assert texts == (generate_texts(model, tokenizer, batch, most) if most else None)
            found.append(scores.compute()["held_in"])
        assert found[1] == pytest.approx(found[0], rel=1e-5)
