"""Make the rows of a task from a seed: an instruction, a word of a few letters, and the answer of a rule.

    order reverse c a b =   ->   b a c

The word alone decides its split, so a test word is never trained on, in any task and under any seed. A model that
learns mostly chatty rows knows the tasks but answers in another format, as a pretrained language model does.
"""

import hashlib
import random
import re
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from modular_experts.data import TaskSource

LETTERS = "abcdefgh"
MOST = {"train": 100_000, "validation": 10_000, "test": 20_000}  # a third to a half of all words, so that drawing ends


class WordTask(TaskSource):
    """Rows of one task on words: subclass it, set `instruction`, and write `answer`.

    Args:
        seed: Seed of the draw of words. Two tasks with the same seed have different words.
        train: Number of training rows, at most 100,000.
        validation: Number of validation rows, at most 10,000.
        test: Number of test rows, at most 20,000.
        chatty: Whether targets repeat the word before the answer, as in `c a b , b a c`.
    """

    #: The start of the input, such as `order reverse`.
    instruction: ClassVar[str]

    def __init__(
        self, seed: int = 0, train: int = 800, validation: int = 16, test: int = 48, chatty: bool = False
    ) -> None:
        self.seed, self.counts, self.chatty = seed, {"train": train, "validation": validation, "test": test}, chatty
        for split, count in self.counts.items():
            if not 0 <= count <= MOST[split]:
                raise ValueError(f"{split}={count} must be from 0 to {MOST[split]}; words have 3 to 6 of 8 letters")

    @classmethod
    def name(cls) -> str:
        """Return the task's name, made from the name of its class, such as `first-two`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    @abstractmethod
    def answer(self, word: str) -> str:
        """Return the answer to a word of `LETTERS`; in the target, spaces stand between its characters."""

    def rows(self) -> Iterator[dict[str, str]]:
        """Yield the rows of all splits; no word comes twice."""
        left, seen = dict(self.counts), set()
        draws = random.Random(f"{self.instruction}/{self.seed}")
        while any(left.values()):
            word = "".join(draws.choices(LETTERS, k=draws.choice((3, 4, 5, 6))))
            split = split_of(word)
            if left[split] and word not in seen:
                left[split] -= 1
                seen.add(word)
                spaced, target = " ".join(word), " ".join(self.answer(word))
                target = f"{spaced} , {target}" if self.chatty else target
                yield {"input": f"{self.instruction} {spaced} =", "target": target, "split": split}


def split_of(word: str) -> str:
    """Return the split of a word: one word in five is for tests, one in ten for validation."""
    tenth = hashlib.md5(word.encode(), usedforsecurity=False).digest()[0] % 10
    return "test" if tenth < 2 else "validation" if tenth == 2 else "train"
