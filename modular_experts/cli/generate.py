"""Run `modular-experts generate`, which answers one prompt, and `chat`, which asks for one prompt after another."""

import sys
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

from modular_experts.base import Base
from modular_experts.data import TaskMixture
from modular_experts.data.chat import Messages
from modular_experts.evaluation.streaming import AS_USUAL, Answering, Conversation, routes_of
from modular_experts.evaluation.streaming import generate as generate_answer
from modular_experts.injection.routed import Routed
from modular_experts.library import Library, StoredExpert, is_adapter, open_expert
from modular_experts.library.record import RECORD_FILE
from modular_experts.routing.prompts import is_rejected, rejection_notice
from modular_experts.study.options import UsageError

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
    data: TaskMixture | None = None,
) -> None:
    """Answer a prompt with a base and experts, and print the answer while it comes.

    The answer alone goes to the standard output. The likeliest token is taken each time, so the same command gives the
    same answer; a temperature above 0 samples.

    Args:
        prompt: The text to answer, in quotes; without one, the whole standard input is the prompt.
        experts: Directories of the experts, whose deltas are added up; or one library, whose only route answers.
        chat_template: Put the prompt as a user's message through the tokenizer's chat template; by default as the
            experts were trained.
        how: How it is answered.
        data: A task of which --shots training rows stand before the prompt as demonstrations.

    Examples:
        modular-experts generate --base DIR "The capital of France is"
        modular-experts generate --experts library/a library/b "Which card did I use?"
        modular-experts generate --experts library "Which card did I use?"
        modular-experts generate --base DIR --tasks a.jsonl --shots 4 "Which card did I use?"
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
    if len(experts) == 1:
        experts = [_route_of(experts[0])]
    if how.system and chat_template is False:
        raise UsageError("--system goes through the chat template; leave --chat_template out")
    asked: str | Messages = prompt
    if how.system:
        asked = [{"role": "system", "content": how.system}, {"role": "user", "content": prompt}]
    opened: str | Base | None = base
    if how.quantise:
        opened = Base.open(base, [open_expert(place, base) for place in experts], quantise=how.quantise)
    generate_answer(
        opened,
        asked,
        experts,
        max_new_tokens=how.max_new_tokens,
        temperature=how.temperature,
        seed=how.seed,
        chat_template=chat_template,
        dtype=how.dtype,
        write=partial(print, end="", flush=True),
        data=data,
    )
    print()


def _route_of(place: str) -> str:
    """Return an expert's directory, or the directory of the only route of a library."""
    folder = Path(place).expanduser()
    if not folder.is_dir() or (folder / RECORD_FILE).is_file() or is_adapter(folder):
        return place
    library = Library(folder)
    routes = routes_of(library)
    if len(routes) == 1:
        return str(folder / routes[0])
    if not len(library):
        return place
    many = f"has the routes {', '.join(routes)}" if routes else "has no route"
    raise UsageError(f"{place} is a library that {many}; name who answers: --experts {place}/{next(iter(library))}")


def chat(
    library: str | None = None, base: str | None = None, expert: str | None = None, how: Answering = AS_USUAL
) -> None:
    """Talk with a base and the experts of a library in the terminal.

    The line before a prompt names who answers: at first the library's route if it has exactly one, else the base.
    `/expert NAME` lets another expert answer, and `/auto` the route; /help shows the other commands. Messages go
    through the chat template, with all that was said before, if the expert that answers was trained with it, or for the
    base alone if it has one. Without it, each prompt is read alone.

    Args:
        library: Directory of the experts.
        expert: Name of the expert that answers first, auto or base.
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
    talk = Conversation(opened, experts, how)
    asks = sys.stdin.isatty()
    line = _first_line(expert, experts)
    if asks:
        print(COMMANDS, flush=True)
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
            if asks:
                print()
            return


def _first_line(expert: str | None, library: Library | dict[str, StoredExpert]) -> str:
    """Return the command with which a chat starts: it lets `expert` answer, or the library's only route."""
    if expert is None:
        has_one = isinstance(library, Library) and len(routes_of(library)) == 1
        return "/auto" if has_one else ""
    if expert == "auto":
        return "/auto"
    return "/expert" if expert == "base" else f"/expert {expert}"


def _obey(talk: Conversation, line: str) -> None:
    command, *names = line.split()
    if command == "/auto":
        names = routes_of(talk.library) if isinstance(talk.library, Library) else []
        if len(names) != 1:
            way = f"take one: /expert {names[0]}" if names else "`route` makes one"
            raise ValueError(f"/auto needs one route in the library, which has {', '.join(names) or 'none'}; {way}")
    if command in ("/auto", "/expert"):
        talk.experts.use(*names)
    elif command == "/new":
        talk.messages = [message for message in talk.messages if message["role"] == "system"]
    elif command == "/help":
        print(f"{COMMANDS}\nexperts: {', '.join(talk.library) or 'none'}")
    else:
        raise ValueError(f"there is no command {command}; /help shows those that there are")


def _chosen(talk: Conversation) -> str:
    """Return which experts the route in use chose for the last prompt, or that it rejected it, as the end of a line."""
    used = talk.experts.used
    if not isinstance(used, Routed) or used.current.gates is None:
        return ""
    gates = used.current.gates
    route = talk.library[talk.experts.names[0]]
    names = [*(str(parent["name"]) for parent in route.record["parents"]), "base"]
    if used.router is not None and is_rejected(used.router, gates).all():
        name = names[used.router.experts]
        return f"  [{rejection_notice(None if name == 'base' else name)}]"
    pairs = zip(gates.ids[0].tolist(), gates.weights[0].tolist(), strict=True)
    return f"  [{', '.join(names[number] for number, weight in pairs if weight)}]"
