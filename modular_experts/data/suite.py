"""Define the 28 tasks of the generated suite: experts are trained on twenty, and eight are held out for tests.

The rows of a task have an instruction, a word of a few letters, and the answer of a rule: `order reverse c a b =` and
`b a c`. The word alone decides its split, so a test word is never trained on, in any task and under any seed. A model
that learns mostly chatty rows knows the tasks but answers in another format, as a pretrained language model does.

The tasks of each of seven families do similar things and share a word of their instruction, so that their experts have
something in common; every held-out task has relatives among the held-in ones.
"""

import hashlib
import random
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

from modular_experts.data import TaskSource

LETTERS = "abcdefgh"
VOWELS = "ae"
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
        self.seed = seed
        self.counts = {"train": train, "validation": validation, "test": test}
        self.chatty = chatty
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
        left = dict(self.counts)
        seen: set[str] = set()
        draws = random.Random(f"{self.instruction}/{self.seed}")
        while any(left.values()):
            word = "".join(draws.choices(LETTERS, k=draws.choice((3, 4, 5, 6))))
            split = split_of(word)
            if left[split] and word not in seen:
                left[split] -= 1
                seen.add(word)
                spaced = " ".join(word)
                target = " ".join(self.answer(word))
                if self.chatty:
                    target = f"{spaced} , {target}"
                yield {"input": f"{self.instruction} {spaced} =", "target": target, "split": split}


def split_of(word: str) -> str:
    """Return the split of a word: one word in five is for tests, one in ten for validation."""
    tenth = hashlib.md5(word.encode(), usedforsecurity=False).digest()[0] % 10
    return "test" if tenth < 2 else "validation" if tenth == 2 else "train"


def _task(name: str, instruction: str, rule: Callable[[str], str]) -> type[WordTask]:
    """Return the task of a name, whose answers are made by a rule."""
    content = {"instruction": instruction, "answer": staticmethod(rule), "__module__": __name__}
    return type(name, (WordTask,), content)


def shifted(word: str, steps: int) -> str:
    """Return the word with each letter moved some steps along the alphabet, which starts again after its end."""
    return "".join(LETTERS[(LETTERS.index(letter) + steps) % len(LETTERS)] for letter in word)


Copy = _task("Copy", "order copy", lambda word: word)
Reverse = _task("Reverse", "order reverse", lambda word: word[::-1])
Sort = _task("Sort", "order sort", lambda word: "".join(sorted(word)))
RotateLeft = _task("RotateLeft", "order left", lambda word: word[1:] + word[0])
SwapEnds = _task("SwapEnds", "order swap", lambda word: word[-1] + word[1:-1] + word[0])
RotateRight = _task("RotateRight", "order right", lambda word: word[-1] + word[:-1])
SortDown = _task("SortDown", "order down", lambda word: "".join(sorted(word, reverse=True)))
Upper = _task("Upper", "map upper", lambda word: word.upper())
Next = _task("Next", "map next", lambda word: shifted(word, 1))
Previous = _task("Previous", "map previous", lambda word: shifted(word, -1))
StarVowels = _task(
    "StarVowels", "map star", lambda word: "".join("*" if letter in VOWELS else letter for letter in word)
)
# Replaces the first letter of the alphabet by the last, the second by the last but one, and so on.
Mirror = _task("Mirror", "map mirror", lambda word: word.translate(str.maketrans(LETTERS, LETTERS[::-1])))
NextButOne = _task("NextButOne", "map skip", lambda word: shifted(word, 2))
FirstTwo = _task("FirstTwo", "pick first", lambda word: word[:2])
LastTwo = _task("LastTwo", "pick last", lambda word: word[-2:])
DropFirst = _task("DropFirst", "pick tail", lambda word: word[1:])
DropLast = _task("DropLast", "pick head", lambda word: word[:-1])
DropEnds = _task("DropEnds", "pick middle", lambda word: word[1:-1])
CountLetters = _task("CountLetters", "count letters", lambda word: str(len(word)))
CountVowels = _task("CountVowels", "count vowels", lambda word: str(sum(letter in VOWELS for letter in word)))
# Counts the letters of the first half of the alphabet.
CountLow = _task("CountLow", "count low", lambda word: str(sum(letter < "e" for letter in word)))
Largest = _task("Largest", "best largest", lambda word: max(word))
Smallest = _task("Smallest", "best smallest", lambda word: min(word))
HasA = _task("HasA", "test a", lambda word: "Y" if "a" in word else "N")
HasH = _task("HasH", "test h", lambda word: "Y" if "h" in word else "N")
EndsAlike = _task("EndsAlike", "test ends", lambda word: "Y" if word[0] == word[-1] else "N")
ReverseUpper = _task("ReverseUpper", "both reverse upper", lambda word: word[::-1].upper())
FirstTwoUpper = _task("FirstTwoUpper", "both first upper", lambda word: word[:2].upper())

# Ordered so that the first few are of different families.
HELD_IN: tuple[type[WordTask], ...] = (
    *(Reverse, Upper, FirstTwo, CountLetters, Largest, HasA, ReverseUpper, Copy, Next, LastTwo),
    *(CountVowels, EndsAlike, Sort, Previous, DropFirst, RotateLeft, StarVowels, DropLast, SwapEnds, Mirror),
)
HELD_OUT: tuple[type[WordTask], ...] = (
    *(RotateRight, NextButOne, DropEnds, CountLow, Smallest, HasH, FirstTwoUpper, SortDown),
)
