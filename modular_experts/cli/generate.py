"""Run `modular-experts generate`, which answers one prompt."""

import sys
from functools import partial
from pathlib import Path

from modular_experts.base import Base, DType
from modular_experts.base.quantised import Quantise
from modular_experts.evaluation.streaming import generate as generate_answer
from modular_experts.library import open_expert
from modular_experts.settings import UsageError


def generate(
    prompt: str | None = None,
    base: str | None = None,
    experts: list[str] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool | None = None,
    dtype: DType = "float32",
    quantise: Quantise | None = None,
) -> None:
    """Answer a prompt with a base and experts, and print the answer while it comes.

    The answer alone goes to the standard output. The likeliest token is taken each time, so the same command gives the
    same answer; a temperature above 0 samples.

    Args:
        prompt: The text to answer, in quotes; without one, the whole standard input is the prompt.
        base: The base's directory or hub id; the one in the experts' records by default.
        experts: Directories of the experts, whose deltas are added up.
        max_new_tokens: The most tokens of the answer, which also ends where the base's context does.
        temperature: Above 0, tokens are sampled, more freely the higher it is.
        seed: Seed of the samples.
        chat: Put the prompt as a user's message through the tokenizer's chat template; by default as the experts were
            trained.
        dtype: Data type of the base.
        quantise: Form in which the base is quantised, such as nf4.

    Examples:
        modular-experts generate --base DIR "The capital of France is"
        modular-experts generate --experts library/a library/b "Which card did I use?"
    """
    experts = list(experts or [])
    if prompt is None and experts and " " in experts[-1] and not Path(experts[-1]).is_dir():
        # The last word behind --experts is the prompt, which no directory could be.
        prompt = experts.pop()
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError('give the text to answer, as in modular-experts generate --base DIR "Once upon a time"')
        prompt = sys.stdin.read().removesuffix("\n")
    if base is None and not experts:
        raise UsageError("--base or --experts must be given, on the command line or in --config")
    write = partial(print, end="", flush=True)
    found = Base.open(base, [open_expert(one, base) for one in experts], quantise=quantise) if quantise else base
    generate_answer(found, prompt, experts, max_new_tokens, temperature, seed, chat, dtype, write)
    print()
