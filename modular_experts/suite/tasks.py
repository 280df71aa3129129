"""Define the 28 tasks of the generated suite: experts are trained on twenty, and eight are held out for tests.

The tasks of each of seven families do similar things and share a word of their instruction, so that their experts have
something in common; every held-out task has relatives among the held-in ones.
"""

from collections.abc import Callable

from modular_experts.suite.words import LETTERS, WordTask

VOWELS = "ae"


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
