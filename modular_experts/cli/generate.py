"""Run `modular-experts generate`, which answers one prompt, and `chat`, which asks for one prompt after another."""

import sys
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from modular_experts.base import Base
from modular_experts.evaluation.streaming import AS_USUAL, Answering, Conversation
from modular_experts.evaluation.streaming import generate as generate_answer
from modular_experts.library import Library, StoredExpert, open_expert
from modular_experts.settings import UsageError

COMMANDS = """\
/expert NAME ...  these experts answer, added up; without a name, the base alone
/auto             the library's route chooses who answers
/new              forget what was said
/help             show these lines, and the names of the experts
/exit             end the chat, as Ctrl-D does; Ctrl-C stops an answer"""


def generate(
    prompt: str | None = None,
    base: str | None = None,
    experts: list[str] | None = None,
    chat_template: bool | None = None,
    how: Answering = AS_USUAL,
) -> None:
    """Answer a prompt with a base and experts, and print the answer while it comes.

    The answer alone goes to the standard output. The likeliest token is taken each time, so the same command gives the
    same answer; a temperature above 0 samples.

    Args:
        prompt: The text to answer, in quotes; without one, the whole standard input is the prompt.
        experts: Directories of the experts, whose deltas are added up.
        chat_template: Put the prompt as a user's message through the tokenizer's chat template; by default as the
            experts were trained.
        how: How it is answered.

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
    if how.system and chat_template is False:
        raise UsageError("--system goes through the chat template; leave --chat_template out")
    said = [{"role": "user", "content": prompt}]
    given = [{"role": "system", "content": how.system}, *said] if how.system else prompt
    found: Any = base
    if how.quantise:
        found = Base.open(base, [open_expert(one, base) for one in experts], quantise=how.quantise)
    sampled = how.max_new_tokens, how.temperature, how.seed
    generate_answer(found, given, experts, *sampled, chat_template, how.dtype, partial(print, end="", flush=True))
    print()


def chat(
    library: str | None = None, base: str | None = None, expert: str | None = None, how: Answering = AS_USUAL
) -> None:
    """Talk with a base and the experts of a library in the terminal.

    The line before a prompt names who answers, at first the base. `/expert NAME` lets another expert answer, and
    `/auto` the library's route; /help shows the other commands. Messages go through the chat template, with all that
    was said before, if the experts in use were trained with it, or for the base alone if it has one. Without it, each
    prompt is read alone.

    Args:
        library: Directory of the experts.
        expert: Name of the expert that answers first, or auto; the base alone by default.
        how: How prompts are answered.

    Examples:
        modular-experts chat library --expert a
        modular-experts chat --base DIR --system "Answer in one word."
    """
    experts: Library | dict[str, StoredExpert] = Library(library, base) if library else {}
    first = [*islice(experts.readable(), 1)] if isinstance(experts, Library) and not base else []
    if not (base or first):
        raise UsageError("give a library that holds experts, or --base DIR")
    opened = Base.open(base, first, quantise=how.quantise)
    with suppress(ImportError):
        import readline  # noqa: F401, with which a terminal edits lines
    talk, asks = Conversation(opened, experts, how), sys.stdin.isatty()
    line = f"/expert {expert}" if expert not in (None, "auto") else "/auto" * (expert == "auto")
    print(COMMANDS if asks else "", end="\n" * asks, flush=True)
    while line.strip() not in ("/exit", "/quit"):
        try:
            if line.startswith("/"):
                _obey(talk, line)
            elif line.strip():
                talk.ask(line, partial(print, end="", flush=True))
                print(_chosen(talk))
        except KeyboardInterrupt:
            print(" (stopped)")
        except (ValueError, KeyError, OSError) as error:
            print(error.args[0], file=sys.stderr)
        try:
            line = input(f"{' + '.join(talk.experts.names) or 'base'}> " if asks else "")
        except EOFError:
            return print(end="\n" * asks)


def _obey(talk: Conversation, line: str) -> None:
    command, *names = line.split()
    if command == "/auto":
        library = talk.library
        experts = library.readable(adapters=False) if isinstance(library, Library) else ()
        names = [expert.name for expert in experts if expert.is_routed]
        if len(names) != 1:
            way = f"take one: /expert {names[0]}" if names else "`route` makes one"
            raise ValueError(f"/auto needs one route in the library, which has {', '.join(names) or 'none'}; {way}")
    if command in ("/auto", "/expert"):
        talk.experts.use(*names)
    elif command == "/new":
        talk.messages = [one for one in talk.messages if one["role"] == "system"]
    elif command == "/help":
        print(f"{COMMANDS}\nexperts: {', '.join(talk.library) or 'none'}")
    else:
        raise ValueError(f"there is no command {command}; /help shows those that there are")


def _chosen(talk: Conversation) -> str:
    """Return which experts the route in use chose for the last prompt, as the end of a line."""
    gates = getattr(getattr(talk.experts.used, "current", None), "gates", None)
    if gates is None:
        return ""
    behind = [*(one["name"] for one in talk.library[talk.experts.names[0]].record["parents"]), "base"]
    pairs = zip(gates.ids[0].tolist(), gates.weights[0].tolist(), strict=True)
    return f"  [{', '.join(behind[number] for number, weight in pairs if weight)}]"
