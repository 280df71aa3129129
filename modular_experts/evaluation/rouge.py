"""Rouge-L: the longest common subsequence of words, F-measure, computed by torchmetrics.

Words are cut so that every script counts (the usual normaliser keeps only a-z and 0-9); on English text the result is
the usual one. No stemming, unlike the paper, whose numbers are therefore slightly higher.
"""

from __future__ import annotations

import re
import unicodedata

from torchmetrics.functional.text.rouge import rouge_score

__all__ = ["rouge_l", "words"]

# Scripts without spaces between words: each character is a word (kana, Han, and Han's extensions).
_CHARACTER_WORDS = re.compile(r"([぀-ヿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff])")


def rouge_l(generated: str, target: str) -> float:
    """Return the Rouge-L F-measure of one text against one target, between 0 and 1."""
    # Naming the key matters: torchmetrics' default keys include one that downloads a sentence splitter.
    scores = rouge_score(generated, target, rouge_keys="rougeL", normalizer=str, tokenizer=words)
    return float(scores["rougeL_fmeasure"])


def words(text: str) -> list[str]:
    """Return the lower-case words of a text: runs of letters, marks and digits of any script."""
    spaced = _CHARACTER_WORDS.sub(r" \1 ", unicodedata.normalize("NFC", text.lower()))
    return "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in spaced).split()
