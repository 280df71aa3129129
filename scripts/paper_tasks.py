"""Make twenty task files of real words and names for the study of `configs/paper/small.yaml`.

    pip install babel lemminflect
    python scripts/paper_tasks.py data/made
    modular-experts study --config configs/paper/small.yaml --config configs/paper/made.yaml

Fifteen tasks are held in and five held out. The rows come from two packages: forms of English words from lemminflect
(MIT), names of countries, languages and currencies from Babel (the Unicode CLDR, Unicode licence). The same versions
give the same bytes. A word is in the same split in all tasks, so no test row is known from another task's training.
"""

import csv
import gzip
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Pairs = Iterator[tuple[str, str]]

MOST = {"train": 400, "validation": 100, "test": 100}
FORMS = {
    "plural": ("noun", 0, "Write the plural of the noun"),
    "past": ("verb", 0, "Write the past tense of the verb"),
    "participle": ("verb", 1, "Write the past participle of the verb"),
    "gerund": ("verb", 2, "Write the -ing form of the verb"),
    "third_person": ("verb", 3, "Write the third person of the verb"),
    "comparative": ("adj", 0, "Write the comparative of the adjective"),
    "superlative": ("adj", 1, "Write the superlative of the adjective"),
}
"""Part of speech and place of a form in the file of lemminflect, and the instruction."""
BACK = {
    "singular": ("plural", "Write the singular of the noun"),
    "infinitive": ("past", "Write the infinitive of the verb"),
}
NAMES = {
    "country_german": ("territories", "de", "Name the country in German"),
    "country_french": ("territories", "fr", "Name the country in French"),
    "country_spanish": ("territories", "es", "Name the country in Spanish"),
    "country_swedish": ("territories", "sv", "Name the country in Swedish"),
    "language_german": ("languages", "de", "Name the language in German"),
    "language_french": ("languages", "fr", "Name the language in French"),
    "language_spanish": ("languages", "es", "Name the language in Spanish"),
    "currency_german": ("currencies", "de", "Name the currency in German"),
    "currency_french": ("currencies", "fr", "Name the currency in French"),
    "country_code": ("territories", "", "Write the two-letter code of the country"),
    "currency_code": ("currencies", "", "Write the three-letter code of the currency"),
}
"""Table of Babel, the language of the target (the code itself without one), and the instruction."""
HELD_OUT = {"participle", "country_swedish", "country_code", "language_spanish", "currency_german"}


def forms(name: str) -> Pairs:
    """Yield words and one form of each; a word whose form is missing, equal or not unique is left out."""
    kind, place, _ = FORMS[name]
    (folder,) = importlib.util.find_spec("lemminflect").submodule_search_locations  # type: ignore[union-attr,misc]
    with gzip.open(Path(folder, "resources/infl_lu.csv.gz"), "rt", encoding="utf-8") as file:
        for word, found, *others in csv.reader(file):
            form = others[place] if place < len(others) else ""
            # An empty participle is the past tense.
            form = others[0] if name == "participle" and not form else form
            if found == kind and word.isalpha() and word.islower() and form.isalpha() and form != word:
                yield word, form


def names(name: str) -> Pairs:
    """Yield English names and the name in another language, or the code."""
    from babel import Locale

    table, language, _ = NAMES[name]
    english: dict[str, Any] = dict(getattr(Locale.parse("en"), table))
    others = getattr(Locale.parse(language), table) if language else {code: code for code in english}
    for code, text in english.items():
        if code.isalpha() and code in others and (text != others[code] or not language):
            yield text, others[code]


def tasks() -> dict[str, tuple[str, Callable[[], Pairs]]]:
    """Return for each task its instruction and its pairs of input and target."""
    made: dict[str, tuple[str, Callable[[], Pairs]]] = {}
    for name, (*_, text) in FORMS.items():
        made[name] = text, lambda name=name: forms(name)  # type: ignore[misc]
    for name, (of, text) in BACK.items():
        made[name] = text, lambda of=of: ((form, word) for word, form in forms(of))  # type: ignore[misc]
    for name, (*_, text) in NAMES.items():
        made[name] = text, lambda name=name: names(name)  # type: ignore[misc]
    return made


def rows(instruction: str, pairs: Pairs, word: Callable[[tuple[str, str]], str]) -> list[dict[str, str]]:
    """Return at most `MOST` rows of each split, in an order by the hash of the word, which also gives the split."""
    left, chosen = dict(MOST), []
    # Of two answers to one input the first counts.
    first = {pair[0]: pair for pair in reversed([*pairs])}.values()
    hashes = {pair: int.from_bytes(hashlib.sha256(word(pair).encode()).digest()[:6]) for pair in first}
    for pair, number in sorted(hashes.items(), key=lambda item: item[1]):
        split = ("train", "train", "train", "train", "validation", "test")[number % 6]
        if left[split]:
            left[split] -= 1
            chosen.append({"input": f"{instruction}: {pair[0]}", "target": pair[1], "split": split})
    return chosen


def write(folder: Path) -> None:
    """Write `held_in/<task>.jsonl` and `held_out/<task>.jsonl`."""
    for name, (instruction, pairs) in tasks().items():
        file = folder / ("held_out" if name in HELD_OUT else "held_in") / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        made = rows(instruction, pairs(), lambda pair: pair[1] if name in BACK else pair[0])  # noqa: B023
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
        print(f"{file}: {len(made)} rows")


if __name__ == "__main__":
    write(Path(*sys.argv[1:2] or ["data/made"]))
