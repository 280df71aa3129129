"""Nine habits of wording that a stranger stumbles over do not come back (CONTRIBUTING, "Style")."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/paper/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))

TICS = {
    "a passive without an agent": r"\b(are|is|were|was) (gone through|told by|told in|told|said in|asked for)\b",
    "'none' or 'no' as a predicate": r"(?<![Tt]here )\b(is|are) (none\b|no (?!longer|more|matter|doubt)[a-z]+)",
    "the business of": r"\bthe business of\b",
    "data that have a say": r"\bha(s|ve) (no|a|the) say\b",
    "a pointing word": r"\b(those of the one before|as many as there are|no more than a key)\b",
    "a title with a colon instead of a sentence": r'^"""[A-Z][\w-]*( [\w-]+)?: [a-z]',
}

# These three stand in older sentences. A number says how many may be left in each folder; it only shrinks.
SHRINKING = {
    "a sentence that begins with 'Of'": r"""(?:[.:;!?] |\"\"\"|(?<!#)# |\n *|\| |- )Of (?!course\b)[a-z]+""",
    "'that of' or 'those of' for a noun": r"\b(that|those)\s+of\b",
    "a free 'what'": r"\b(of|by|to|than|with|for|on|from|into|beside|is|are)\s+what\b",
}
LEFT = {"modular_experts": (0, 4, 1), "tests": (0, 3, 1), "docs": (0, 1, 0), ".": (0, 0, 0)}
SOURCES = {
    "modular_experts": sorted((ROOT / "modular_experts").rglob("*.py")),
    "tests": sorted(file for file in (ROOT / "tests").rglob("*.py") if file != Path(__file__)),
    "docs": sorted((ROOT / "docs").rglob("*.md")),
    ".": [*PAGES[:3], *sorted((ROOT / "configs").rglob("*.*"))],
}


def offences(text: str) -> list[str]:
    """Return each habit that a text has, with the words."""
    found = []
    for habit, pattern in TICS.items():
        matches = re.finditer(pattern, text, re.MULTILINE if habit != list(TICS)[-1] else 0)
        found += [f"{habit}: {' '.join(match[0].split())!r}" for match in matches]
    return found


def test_nobody_stumbles_over_the_package() -> None:
    files = [*sorted((ROOT / "modular_experts").rglob("*.py")), *PAGES]
    found = {file.relative_to(ROOT): offences(file.read_text(encoding="utf-8")) for file in files}
    assert not [f"{file}: {one}" for file, several in found.items() for one in several]


@pytest.mark.parametrize("folder", SOURCES)
def test_nouns_and_subjects_are_written_out(folder: str) -> None:
    for (habit, pattern), most in zip(SHRINKING.items(), LEFT[folder], strict=True):
        texts = {file: file.read_text(encoding="utf-8") for file in SOURCES[folder]}
        found = [
            f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, match.end()) + 1}: {' '.join(match[0].split())}"
            for file, text in texts.items()
            for match in re.finditer(pattern, text)
        ]
        assert len(found) <= most, f"{habit}: {len(found)} times in {folder}, at most {most}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("habit", "text"),
    [
        ("a sentence that begins with 'Of'", "It ends. Of several records the last counts."),
        ("'that of' or 'those of' for a noun", "The logits are those of the base."),
        ("a free 'what'", "Routers choose by what they read."),
    ],
)
def test_each_shrinking_habit_is_found(habit: str, text: str) -> None:
    assert [name for name, pattern in SHRINKING.items() if re.search(pattern, text)] == [habit]


@pytest.mark.parametrize(
    "text",
    [
        "The names are gone through twice.",
        "A number is none, or too large.",
        "What is kept is the business of the library.",
        "An expert has a say about it.",
        '"""Proof: an adapter is loaded again."""',
    ],
)
def test_each_habit_is_caught(text: str) -> None:
    assert len(offences(text)) == 1


def test_plain_sentences_pass() -> None:
    assert not offences(
        '"""Load the adapter again and compare it.\n\nThere is no longer a mask. No expert moves it."""'
    )
