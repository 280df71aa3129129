"""Define the 28 tasks of the generated suite: experts are trained on twenty, and eight are held out for tests.

They form seven families. The tasks of a family do similar things and share a word of their instruction, so that their
experts have something in common; every held-out task has relatives among the held-in ones. To add a task, write such a
class in a file of your own and name it in a config as `source: my_file.MyTask`.
"""

from __future__ import annotations

from modular_experts.suite.words import LETTERS, WordTask

VOWELS = "ae"


class Copy(WordTask):
    instruction = "order copy"

    def answer(self, word: str) -> str:
        return word


class Reverse(WordTask):
    instruction = "order reverse"

    def answer(self, word: str) -> str:
        return word[::-1]


class Sort(WordTask):
    instruction = "order sort"

    def answer(self, word: str) -> str:
        return "".join(sorted(word))


class RotateLeft(WordTask):
    instruction = "order left"

    def answer(self, word: str) -> str:
        return word[1:] + word[0]


class SwapEnds(WordTask):
    instruction = "order swap"

    def answer(self, word: str) -> str:
        return word[-1] + word[1:-1] + word[0]


class RotateRight(WordTask):
    instruction = "order right"

    def answer(self, word: str) -> str:
        return word[-1] + word[:-1]


class SortDown(WordTask):
    instruction = "order down"

    def answer(self, word: str) -> str:
        return "".join(sorted(word, reverse=True))


class Upper(WordTask):
    instruction = "map upper"

    def answer(self, word: str) -> str:
        return word.upper()


class Next(WordTask):
    instruction = "map next"

    def answer(self, word: str) -> str:
        return shifted(word, 1)


class Previous(WordTask):
    instruction = "map previous"

    def answer(self, word: str) -> str:
        return shifted(word, -1)


class StarVowels(WordTask):
    instruction = "map star"

    def answer(self, word: str) -> str:
        return "".join("*" if letter in VOWELS else letter for letter in word)


class Mirror(WordTask):
    """Replaces the first letter of the alphabet by the last, the second by the last but one, and so on."""

    instruction = "map mirror"

    def answer(self, word: str) -> str:
        return word.translate(str.maketrans(LETTERS, LETTERS[::-1]))


class NextButOne(WordTask):
    instruction = "map skip"

    def answer(self, word: str) -> str:
        return shifted(word, 2)


class FirstTwo(WordTask):
    instruction = "pick first"

    def answer(self, word: str) -> str:
        return word[:2]


class LastTwo(WordTask):
    instruction = "pick last"

    def answer(self, word: str) -> str:
        return word[-2:]


class DropFirst(WordTask):
    instruction = "pick tail"

    def answer(self, word: str) -> str:
        return word[1:]


class DropLast(WordTask):
    instruction = "pick head"

    def answer(self, word: str) -> str:
        return word[:-1]


class DropEnds(WordTask):
    instruction = "pick middle"

    def answer(self, word: str) -> str:
        return word[1:-1]


class CountLetters(WordTask):
    instruction = "count letters"

    def answer(self, word: str) -> str:
        return str(len(word))


class CountVowels(WordTask):
    instruction = "count vowels"

    def answer(self, word: str) -> str:
        return str(sum(letter in VOWELS for letter in word))


class CountLow(WordTask):
    """Counts the letters of the first half of the alphabet."""

    instruction = "count low"

    def answer(self, word: str) -> str:
        return str(sum(letter < "e" for letter in word))


class Largest(WordTask):
    instruction = "best largest"

    def answer(self, word: str) -> str:
        return max(word)


class Smallest(WordTask):
    instruction = "best smallest"

    def answer(self, word: str) -> str:
        return min(word)


class HasA(WordTask):
    instruction = "test a"

    def answer(self, word: str) -> str:
        return "Y" if "a" in word else "N"


class HasH(WordTask):
    instruction = "test h"

    def answer(self, word: str) -> str:
        return "Y" if "h" in word else "N"


class EndsAlike(WordTask):
    instruction = "test ends"

    def answer(self, word: str) -> str:
        return "Y" if word[0] == word[-1] else "N"


class ReverseUpper(WordTask):
    instruction = "both reverse upper"

    def answer(self, word: str) -> str:
        return word[::-1].upper()


class FirstTwoUpper(WordTask):
    instruction = "both first upper"

    def answer(self, word: str) -> str:
        return word[:2].upper()


def shifted(word: str, steps: int) -> str:
    """Return the word with each letter moved some steps along the alphabet, which starts again after its end."""
    return "".join(LETTERS[(LETTERS.index(letter) + steps) % len(LETTERS)] for letter in word)


# Ordered so that the first few are of different families.
HELD_IN: tuple[type[WordTask], ...] = (
    *(Reverse, Upper, FirstTwo, CountLetters, Largest, HasA, ReverseUpper, Copy, Next, LastTwo),
    *(CountVowels, EndsAlike, Sort, Previous, DropFirst, RotateLeft, StarVowels, DropLast, SwapEnds, Mirror),
)
HELD_OUT: tuple[type[WordTask], ...] = (
    *(RotateRight, NextButOne, DropEnds, CountLow, Smallest, HasH, FirstTwoUpper, SortDown),
)
