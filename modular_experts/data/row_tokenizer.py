"""Tokenise rows of text into examples; `chat.py` tokenises conversations.

Input and target are tokenised apart, without special tokens, and end-of-sequence follows the target, also in each
demonstration before a row. Only an encoder reads an input with the special tokens that its tokenizer adds.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from transformers import PreTrainedTokenizerBase

from modular_experts.data.batch import Example, Tokens, fitted
from modular_experts.data.chat import ConversationTokenizer, adds_to_prompts, classifies, prompt_text
from modular_experts.data.demonstrations import as_turns, behind_turns
from modular_experts.data.rows import Row
from modular_experts.injection.task_heads import class_number


class RowTokenizer:
    """Tokenises the rows of a task.

    Args:
        tokenizer: The model's tokenizer.
        max_length, chat_template: As for `TaskMixture`; the length counts end-of-sequence.
        learns_choices: Whether rows to learn have their choices, too.
        context: How many tokens of a row the model can read, if that is known (`injection.context_length`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 1024,
        chat_template: bool = False,
        context: int | None = None,
        learns_choices: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None and not classifies(tokenizer):
            raise ValueError("the tokenizer has no end-of-sequence token to end a target; set tokenizer.eos_token")
        if chat_template and tokenizer.chat_template is None:
            raise ValueError("chat_template is set, but the tokenizer has no chat template (tokenizer.chat_template)")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.learns_choices = learns_choices
        self.longest = max_length if context is None else min(max_length, context)
        if classifies(tokenizer):
            # RoBERTa has positions that no token takes.
            self.longest = min(self.longest, tokenizer.model_max_length)
        self.limit = f"max_length={max_length}"
        """What bounds the tokens of a row, for sentences."""
        self._filled = f"{self.limit}; raise it"
        if classifies(tokenizer) and self.longest == tokenizer.model_max_length < max_length:
            self.limit = f"the tokenizer's model_max_length of {self.longest} tokens"
            self._filled = f"{self.limit}; shorten it"
        elif self.longest < max_length:
            self.limit = f"the base's context of {context} tokens"
            self._filled = f"{self.limit}; shorten it"
        if self.longest < 3:
            raise ValueError(f"{self.limit} must be at least 3: a prompt, a target and end-of-sequence")

    @property
    def pad_id(self) -> int:
        """The token to pad with, or end-of-sequence without one: safe, because batches mask padding by its place."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def __call__(
        self, task: str, rows: Sequence[Row], learn: bool = False, demonstrations: Sequence[Sequence[Row]] = ()
    ) -> tuple[list[Example], int, list[str]]:
        """Tokenise the rows of a task; return examples in their order, how many lost tokens, and sentences on bad ones.

        Conversations to `learn` have each turn of the assistant as a target, not only the last. With `demonstrations`,
        a list for each row, these stand in the prompt before it: as turns of a conversation with a chat template. A row
        that would be too long has fewer of them.
        """
        before = [list(own) for own in demonstrations] or [[] for _ in rows]
        if classifies(self.tokenizer):
            if any(before):
                raise ValueError("a classifier reads a text and no demonstrations before it; leave shots out")
            if any(row.messages for row in rows):
                why = "a classifier answers a text with a class; write rows of input and target"
                return [], 0, [f"{row.where}: {why}" for row in rows if row.messages]
        if talks := [row for row in rows if row.messages]:
            tokenize = ConversationTokenizer(self.tokenizer, self.longest, self._filled)
            pairs = zip(rows, before, strict=True)
            whole = [replace(row, messages=behind_turns(row, own)) for row, own in pairs if row.messages]
            talk_examples, cut, refused = tokenize(task, whole, learn, self.learns_choices or not learn)
            mixed = f"this row has texts, and {talks[0].where} is a conversation; write all rows of a task alike"
            return talk_examples, cut, [*(f"{row.where}: {mixed}" for row in rows if not row.messages), *refused]
        texts = self._texts(rows)
        targets = self._ends(texts, [[row.target or ""] for row in rows])
        options = self._ends(texts, [() if learn and not self.learns_choices else row.choices for row in rows])
        most_tokens = [max(map(len, [*own, *others])) for own, others in zip(targets, options, strict=True)]
        prompts = self._prompts(rows, before, most_tokens)
        end = self.tokenizer.eos_token_id
        examples: list[Example] = []
        problems: list[str] = []
        cut = 0
        columns = zip(rows, texts, before, prompts, targets, options, strict=True)
        for row, text, own, prompt, (target,), choices in columns:
            if row.target is None:
                target = []
            answers = [target, *choices]
            most = max(map(len, answers))
            if not prompt or (len(target) == 1 and not classifies(self.tokenizer)):
                problems.append(f"{row.where}: the tokenizer makes no tokens of the {'target' if prompt else 'input'}")
                continue
            # Every choice gets the same prompt, so that their scores can be compared.
            kept = self._fitted(prompt, most, text)
            if not kept:
                problems.append(f"{row.where}: the target or a choice fills {self._filled}")
                continue
            cut += len(kept) < len(prompt)
            tokens, *others = (
                Tokens(torch.tensor([*kept, *answer], dtype=torch.int32), len(kept)) for answer in answers
            )
            example = Example(task, row.input, row.target, tokens, tuple(others), correct_of(row), end, len(examples))
            examples.append(replace(example, shots=len(own)))
        return examples, cut, problems

    def _fitted(self, prompt: list[int], answer: int, text: str) -> list[int]:
        """Return a prompt that leaves room for an answer: the end of it, and for an encoder the start of its text."""
        if classifies(self.tokenizer) and len(prompt) + answer > self.longest:
            return self.tokenizer(text, truncation=True, max_length=self.longest - answer)["input_ids"]
        return fitted(prompt, answer, self.longest)

    def _texts(self, rows: Sequence[Row], demonstrations: Sequence[Sequence[Row]] = ()) -> list[str]:
        """Return the text that asks for the answer to each row; a chat template has demonstrations as turns before."""
        if not self.chat_template:
            return [row.input for row in rows]
        before = demonstrations or [() for _ in rows]
        asked = [{"role": "user", "content": row.input} for row in rows]
        return [
            prompt_text(self.tokenizer, [*as_turns(own), message]) for own, message in zip(before, asked, strict=True)
        ]

    def _prompts(self, rows: Sequence[Row], before: Sequence[list[Row]], answers: Sequence[int]) -> list[list[int]]:
        """Return the tokens of each prompt, and drop demonstrations of `before` that leave its answer no room."""
        prompts = self._ids_behind(rows, before)
        while long := [n for n, ids in enumerate(prompts) if before[n] and len(ids) + answers[n] > self.longest]:
            for number in long:
                del before[number][0]
            shorter = self._ids_behind([rows[number] for number in long], [before[number] for number in long])
            for number, ids in zip(long, shorter, strict=True):
                prompts[number] = ids
        return prompts

    def _ids_behind(self, rows: Sequence[Row], before: Sequence[Sequence[Row]]) -> list[list[int]]:
        """Return the tokens of each prompt with its demonstrations."""
        prompts = self._ids(self._texts(rows, before), adds_to_prompts(self.tokenizer))
        if self.chat_template:
            return prompts
        shown = {(row.input, str(row.target)): row for own in before for row in own}
        inputs = [row.input for row in shown.values()]
        ends = self._ends(inputs, [[str(row.target)] for row in shown.values()])
        ids = {key: [*ids, *end] for key, ids, (end,) in zip(shown, self._ids(inputs), ends, strict=True)}
        return [
            [*chain.from_iterable(ids[row.input, str(row.target)] for row in own), *prompt]
            for own, prompt in zip(before, prompts, strict=True)
        ]

    def _ends(self, prompts: Sequence[str], targets: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Return the tokens of each prompt's targets, with end-of-sequence, all made in one call of the tokenizer.

        For a classifier, a target is the number of a class.
        """
        if classifies(self.tokenizer):
            return [[[class_number(target)] for target in own_targets] for own_targets in targets]
        texts = [
            as_continuation(prompt, target)
            for prompt, own_targets in zip(prompts, targets, strict=True)
            for target in own_targets
        ]
        ids = iter(self._ids(texts))
        return [[[*next(ids), self.tokenizer.eos_token_id] for _ in own_targets] for own_targets in targets]

    def _ids(self, texts: list[str], special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        how = {"return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, add_special_tokens=special, **how)["input_ids"]


def correct_of(row: Row) -> int:
    """Return the number of the right choice; of labels that lack the target, none is right."""
    return row.choices.index(str(row.target)) if row.target in row.choices else len(row.choices)


def as_continuation(prompt: str, target: str) -> str:
    """Return the target as it follows the prompt: after one space, unless either side has white space at the joint."""
    return target if prompt[-1:].isspace() or target[:1].isspace() else f" {target}"
