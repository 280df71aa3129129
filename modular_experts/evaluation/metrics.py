"""Score a generated text against its target: exactly, by words, or by the number, JSON or pattern in it."""

import json
import pkgutil
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from torchmetrics.functional.text.rouge import rouge_score

from modular_experts.text import did_you_mean

TextMetric = Callable[[str, str], float]
"""Scores a generated text against its target; the mean over the rows of a task is its score."""
if TYPE_CHECKING:
    Metrics = Mapping[str, TextMetric | str] | Sequence[TextMetric | str] | str
else:
    # What the command line may be given.
    Metrics = list[str] | dict[str, str] | str

# Commas or spaces, also narrow and no-break ones, stand between groups of three digits.
_WHOLE = r"\d{1,3}(,\d{3})+(?!\d)|(?<![\w.])\d{1,3}([ \u00a0\u2009\u202f]\d{3})+(?!\d)|\d+"
# A sign, perhaps U+2212, after a letter or digit is a hyphen.
_NUMBER = re.compile(rf"((?<![\w.)])[-+\u2212])?(({_WHOLE})(\.\d+)?|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
# Scripts without spaces between words: each character is a word (kana, Han, and Han's extensions).
_CHARACTER_WORDS = re.compile(r"([぀-ヿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff])")


def exact_match(generated: str, target: str) -> float:
    """Return 1.0 if both texts are the same but for white space at their ends, else 0.0."""
    return float(generated.strip() == target.strip())


def rouge_l(generated: str, target: str) -> float:
    """Return the Rouge-L F-measure of one text against one target, between 0 and 1."""
    return _rouge_l(generated, target)


def stemmed_rouge_l(generated: str, target: str) -> float:
    """Return Rouge-L over the stems of English words (Porter's), as the evaluation of arXiv 2507.07140 takes it.

    Words of up to three letters stay as they are. It needs nltk: `pip install 'modular-experts[rouge]'`.
    """
    try:
        return _rouge_l(generated, target, use_stemmer=True)
    except ModuleNotFoundError as error:
        raise ValueError("stemmed_rouge_l needs nltk: pip install 'modular-experts[rouge]'") from error


# Merges of the same experts give many rows the same answer, and a study asks again for each row's value.
@lru_cache(2**14)
def _rouge_l(generated: str, target: str, use_stemmer: bool = False) -> float:
    # Naming the key matters: torchmetrics' default keys include one that downloads a sentence splitter.
    scores = rouge_score(
        generated, target, use_stemmer=use_stemmer, rouge_keys="rougeL", normalizer=str, tokenizer=words
    )
    return float(scores["rougeL_fmeasure"])


def words(text: str) -> list[str]:
    """Return the lower-case words of a text: runs of letters, marks and digits of any script."""
    spaced = _CHARACTER_WORDS.sub(r" \1 ", unicodedata.normalize("NFC", text.lower()))
    return "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in spaced).split()


def number(generated: str, target: str) -> float:
    """Return 1.0 if both texts have the same last number, else 0.0; 1,250.0 and 1 250 are 1250, and 0,5 ends in 5."""
    return _read_alike(_last_number, generated, target)


def same_json(generated: str, target: str) -> float:
    """Return 1.0 if both texts hold the same JSON, perhaps in a Markdown fence, else 0.0; the order of keys is free."""
    return _read_alike(_canonical_json, generated, target)


def matched(pattern: str, generated: str, target: str) -> float:
    """Return 1.0 if a regular expression finds the same text in the answer and in the target, else 0.0.

    The last match that is not empty counts, and where the pattern has groups, the first of them that took part in it.
    """

    def last_match(text: str) -> str | None:
        last = None
        for match in re.finditer(pattern, text):
            groups = match.groups() or (match[0],)
            taken = next((group for group in groups if group is not None), "").strip()
            last = taken or last
        return last

    return _read_alike(last_match, generated, target)


def _read_alike(read: Callable[[str], object], generated: str, target: str) -> float:
    answer = read(generated)
    wanted = read(target)
    if wanted is None:
        # A target in which nothing is found, such as a word where others are numbers, counts as it is.
        wanted = target.strip()
        answer = generated.strip() if answer is None else answer
    return float(answer == wanted)


def _last_number(text: str) -> Decimal | None:
    matches = list(_NUMBER.finditer(text))
    with suppress(InvalidOperation):  # an exponent of twenty digits
        return Decimal(re.sub(r"[,\s]", "", matches[-1][0]).replace("\u2212", "-")) if matches else None
    return None


def _canonical_json(text: str) -> str | None:
    inner = re.fullmatch(r"```\w*\r?\n(.*)```", text.strip(), re.DOTALL)

    def whole(digits: str) -> float | int:
        return int(value) if (value := float(digits)).is_integer() else value

    with suppress(ValueError, RecursionError):
        return json.dumps(json.loads(inner[1] if inner else text, parse_float=whole), sort_keys=True)
    return None


TEXT_METRICS: dict[str, TextMetric] = {"exact_match": exact_match, "rougeL": rouge_l}
NAMED = TEXT_METRICS | {"number": number, "json": same_json, "stemmed_rouge_l": stemmed_rouge_l}
"""The metrics that have a name of their own."""
TAKEN = ("loss", "choice_accuracy", "role", "rows", "tokens", "gain", "normalised", "mean_over_draws", "size")
"""Names that results have already; a study writes the last four."""


def text_metrics(own: Metrics | None = None) -> dict[str, TextMetric]:
    """Return exact match and Rouge-L with further metrics beside them, or in their place where a name is theirs.

    Args:
        own: Metrics by name, or a list of metrics. Each is a function of a generated text and its target, its dotted
            path, one of `number`, `json` and `stemmed_rouge_l`, or a regular expression between slashes (`matched`). In
            a list, `year=/[0-9]{4}/` names one; others are called by the last part of their path.

    Raises:
        ValueError: A metric is not known, cannot be imported, fails, or returns no number.
    """
    metrics = dict(TEXT_METRICS)
    for name, metric in named_metrics(own).items():
        made = _made(name, metric) if isinstance(metric, str) else metric
        try:
            value = made("one answer", "one answer")
        except Exception as error:
            raise ValueError(
                f"metrics.{name} must score any generated text against its target, and failed with two texts "
                f"({type(error).__name__}: {error})"
            ) from error
        if not isinstance(value, int | float):
            raise ValueError(f"metrics.{name} returned {value!r} for two texts; a metric must return a number")
        metrics[name] = made
    return metrics


def named_metrics(own: Metrics | None) -> dict[str, TextMetric | str]:
    """Return the metrics that `text_metrics` takes by name, as they were given."""
    if isinstance(own, Mapping):
        named = dict(own)
    else:
        named = {}
        for asked in [own] if isinstance(own, str) else own or ():
            name, metric = _named(asked)
            if name in named:
                raise ValueError(f"two metrics are called {name}; name one of them: {name}-2={metric}")
            named[name] = metric
    if taken := [name for name in TAKEN if name in named]:
        raise ValueError(f"a metric cannot be called {taken[0]}, because results have that already; give another name")
    return named


def _named(metric: TextMetric | str) -> tuple[str, TextMetric | str]:
    if not isinstance(metric, str):
        return getattr(metric, "__name__", type(metric).__name__), metric
    name, equals, path = metric.partition("=")
    if equals and name and "/" not in name:
        return name, path
    # A regular expression may have the sign in it.
    return "regex" if metric.startswith("/") else metric.rpartition(".")[2], metric


def _made(name: str, metric: str) -> TextMetric:
    if metric in NAMED:
        return NAMED[metric]
    if len(metric) > 1 and metric[0] == metric[-1] == "/":
        try:
            return partial(matched, re.compile(metric[1:-1]).pattern)
        except re.error as error:
            raise ValueError(f"`metrics.{name}=`: {metric} is not a regular expression: {error}") from None
    if "." not in metric or metric.startswith("/"):
        near = did_you_mean(metric, NAMED) or f"; there are {', '.join(NAMED)}, a path of yours (mine.length), /regex/"
        raise ValueError(f"`metrics.{name}=`: there is no metric {metric!r}{near}")
    return _imported(name, metric)


def _imported(name: str, path: str) -> TextMetric:
    try:
        # A checkpoint names metrics too, and much of the standard library runs anything.
        if path.partition(".")[0] in sys.stdlib_module_names:
            raise ImportError("the standard library has no metrics")
        metric = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(f"`metrics.{name}=`: {path} cannot be imported: {error}") from error
    if isinstance(metric, type):
        metric = metric()
    if not callable(metric):
        raise ValueError(f"`metrics.{name}=`: {path} cannot be called; name a function of two texts")
    return metric
