"""Tokenise rows of text into examples; `chat.py` tokenises conversations.

Input and target are tokenised apart, without special tokens, and end-of-sequence follows the target.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from modular_experts.data.batch import Example, Tokens, fitted
from modular_experts.data.chat import ConversationTokenizer, prompt_text
from modular_experts.data.rows import Row


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
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token to end a target; set tokenizer.eos_token")
        if chat_template and tokenizer.chat_template is None:
            raise ValueError("chat_template is set, but the tokenizer has no chat template (tokenizer.chat_template)")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.learns_choices = learns_choices
        self.longest = max_length if context is None else min(max_length, context)
        self.limit = f"max_length={max_length}"
        """What bounds the tokens of a row, for sentences."""
        self._filled = f"{self.limit}; raise it"
        if self.longest < max_length:
            self.limit = f"the base's context of {context} tokens"
            self._filled = f"{self.limit}; shorten it"
        if self.longest < 3:
            raise ValueError(f"{self.limit} must be at least 3: a prompt, a target and end-of-sequence")

    @property
    def pad_id(self) -> int:
        """The token to pad with, or end-of-sequence without one: safe, because batches mask padding by its place."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def __call__(self, task: str, rows: Sequence[Row], learn: bool = False) -> tuple[list[Example], int, list[str]]:
        """Tokenise the rows of a task; return examples in their order, how many lost tokens, and sentences on bad ones.

        Conversations to `learn` have each turn of the assistant as a target, not only the last.
        """
        if talks := [row for row in rows if row.messages]:
            tokenize = ConversationTokenizer(self.tokenizer, self.longest, self._filled)
            talk_examples, cut, refused = tokenize(task, talks, learn, self.learns_choices or not learn)
            mixed = f"this row has texts, and {talks[0].where} is a conversation; write all rows of a task alike"
            return talk_examples, cut, [*(f"{row.where}: {mixed}" for row in rows if not row.messages), *refused]
        texts = [row.input for row in rows]
        if self.chat_template:
            texts = [prompt_text(self.tokenizer, [{"role": "user", "content": text}]) for text in texts]
        prompts = self._ids(texts)
        targets = self._ends(texts, [[row.target or ""] for row in rows])
        options = self._ends(texts, [() if learn and not self.learns_choices else row.choices for row in rows])
        end = self.tokenizer.eos_token_id
        examples: list[Example] = []
        problems: list[str] = []
        cut = 0
        for row, prompt, (target,), choices in zip(rows, prompts, targets, options, strict=True):
            if row.target is None:
                target = []
            answers = [target, *choices]
            most = max(map(len, answers))
            if not prompt or len(target) == 1:
                problems.append(f"{row.where}: the tokenizer makes no tokens of the {'target' if prompt else 'input'}")
                continue
            # Every choice gets the same prompt, so that their scores can be compared.
            kept = fitted(prompt, most, self.longest)
            if not kept:
                problems.append(f"{row.where}: the target or a choice fills {self._filled}")
                continue
            cut += len(kept) < len(prompt)
            correct = row.choices.index(str(row.target)) if row.choices else 0
            tokens, *others = (
                Tokens(torch.tensor([*kept, *answer], dtype=torch.int32), len(kept)) for answer in answers
            )
            examples.append(Example(task, row.input, row.target, tokens, tuple(others), correct, end, len(examples)))
        return examples, cut, problems

    def _ends(self, prompts: Sequence[str], targets: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Return the tokens of each prompt's targets, with end-of-sequence, all made in one call of the tokenizer."""
        texts = [
            as_continuation(prompt, target)
            for prompt, own_targets in zip(prompts, targets, strict=True)
            for target in own_targets
        ]
        ids = iter(self._ids(texts))
        return [[[*next(ids), self.tokenizer.eos_token_id] for _ in own_targets] for own_targets in targets]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def as_continuation(prompt: str, target: str) -> str:
    """Return the target as it follows the prompt: after one space, unless either side has white space at the joint."""
    return target if prompt[-1:].isspace() or target[:1].isspace() else f" {target}"
