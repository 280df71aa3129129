"""List the commands, for the program, its help and completion; it is imported by every command, so it imports no torch.

A system of `modular_experts/systems` may bring commands: the functions of its file `commands.py`.
"""

import ast
import atexit
import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from modular_experts.discovery import SYSTEMS
from modular_experts.study.options import FIT_ALONE, SHORT_NAMES


class Command(NamedTuple):
    """A command: its file in `cli/` or another folder, its function (empty if it runs a trainer), and its help."""

    file: str
    function: str
    summary: str
    # Options that may also be given by position.
    positional: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The file in the package, without its suffix."""
        return self.file if "/" in self.file else f"cli/{self.file}"


@contextmanager
def importing() -> Iterator[None]:
    """Import what a command needs, and never look through it for garbage.

    Searching a million objects that stay took a third of the time of `list`, and a quarter of a fit of one step.
    """
    # It warns that it lacks a package which makes 4-bit products faster, at each import of PEFT.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    before = len(sys.modules)
    gc.disable()
    try:
        yield
        # Where all is imported already, there may be garbage.
        if len(sys.modules) > before:
            gc.freeze()
            # Triton's bindings report objects that nobody frees as leaks; without Triton the process ends faster.
            atexit.register(lambda: gc.unfreeze() if "triton" in sys.modules else None)
    finally:
        gc.enable()


def system_commands() -> Iterator[tuple[str, Command]]:
    """Yield the name and command of each public function in a system's `commands.py`, read from its source."""
    for file in sorted(SYSTEMS.glob("*/commands.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                first = (ast.get_docstring(node) or "").partition("\n")[0].partition(":")[0].rstrip(".")
                summary = first[:1].lower() + first[1:]
                yield node.name, Command(f"systems/{file.parent.name}/commands", node.name, summary)


VERBS = {
    "quickstart": Command("study", "quickstart", "see it all on generated tasks: train, merge, test, report"),
    "fit": Command("training", "", "train experts on task files"),
    "study": Command("study", "study", "train, merge and test many experts by one description"),
    "look": Command("evaluate", "look", "show the rows of task files as `fit` reads them: tokens, lengths", ("tasks",)),
    "validate": Command("training", "", "measure a model on the validation rows"),
    "test": Command("training", "", "measure one model on the test rows, also a checkpoint of `fit`"),
    "evaluate": Command("evaluate", "evaluate", "compare a base and experts on the test rows: a table, a page"),
    "harness": Command("evaluate", "harness", "measure experts on benchmarks, by the lm-evaluation-harness"),
    "predict": Command("training", "", "write a model's answers"),
    "generate": Command("generate", "generate", "answer one prompt, from the command line or a pipe", ("prompt",)),
    "chat": Command("generate", "chat", "talk with a base and experts in the terminal", ("library",)),
    "serve": Command("serve", "serve", "answer requests over HTTP, each with its own expert", ("library",)),
    "import": Command("interop", "import_", "bring adapters or fine-tuned checkpoints into a library", ("source",)),
    "statistics": Command(
        "search", "statistics", "measure what some merge methods need of the experts' data", ("experts",)
    ),
    "methods": Command("methods", "methods", "show the merge methods: formulas, settings, sources", ("name",)),
    "interference": Command(
        "methods", "interference", "show how experts get in each other's way, before they are merged", ("experts",)
    ),
    "adapt": Command("search", "adapt", "train an expert of a new task on few rows, from a library", ("experts",)),
    "distill": Command("search", "distill", "train one expert that does what many do, without labels", ("experts",)),
    "combine": Command("search", "combine", "find the best of merges and routers within some bytes", ("experts",)),
    "merge": Command("merge", "merge", "merge experts into one expert", ("experts",)),
    "search": Command("search", "search", "find on validation rows how much of each expert to merge", ("experts",)),
    "route": Command("search", "route", "put experts behind a router, which chooses by the input", ("experts",)),
    "shrink": Command("search", "shrink", "store experts in the fewest bytes that keep their loss", ("experts",)),
    "mergekit": Command(
        "interop", "mergekit", "run a recipe of mergekit: checkpoints into a checkpoint", ("recipe", "out")
    ),
    "remove": Command("merge", "remove", "take one expert out of an average again", ("merged",)),
    "apply": Command("interop", "apply", "add experts to their base: an ordinary checkpoint", ("experts",)),
    "export": Command("interop", "export", "write experts as adapters for PEFT and for servers", ("experts",)),
    "push": Command("interop", "push", "push experts and a card about them to the Hugging Face hub", ("experts",)),
    "pull": Command("interop", "pull", "pull experts from the Hugging Face hub into a library", ("repo",)),
    "list": Command("library", "list_library", "list the experts of a library", ("library",)),
    "show": Command("library", "show", "show everything about one expert", ("expert",)),
    "verify": Command("library", "verify", "check an expert's files and its base", ("expert",)),
    "completion": Command(
        "completion", "completion", "let a shell complete commands, and an editor check configs", ("program", "command")
    ),
    **dict(system_commands()),
}

COMPUTING = {"adapt", "chat", "combine", "compress", "distill", "evaluate", "fit", "generate", "harness", "merge"}
COMPUTING |= {"predict", "quickstart", "route", "search", "serve", "shrink", "statistics", "study", "test", "validate"}
"""Commands that load a model and compute with it, on the device that `--device` names."""
DEVICE = {"--device NAME": "Where models compute: cpu, cuda, cuda:1. (default: a GPU if there is one)"}

# The texts of the options that most runs need, as `--help` shows them.
OWN_OPTIONS = {
    "--out LIBRARY/NAME": "Directory of the expert; without it, none is kept.",
    "--overwrite": "Replace an expert.",
    "--keep_inputs N": "Keep N training inputs beside it, for merges.",
    "--dry-run": "Only tell plan, time, memory; also --fit-into 24GB.",
}
"""Options of `fit` that are arguments of no class, and their texts."""
_PLACES = {
    "--base PLACE": "Directory or hub id of the model.",
    "--tasks FILE [FILE ...]": "Task files, such as a.jsonl b.csv; a task is named after its file.",
}
_EXPERT = {
    "--expert TYPE": "SparseExpert, LoRAExpert, FullExpert, MaskedExpert, ..., or module.Class of yours; "
    "--expert.NAME X is a setting of it, and --expert.help TYPE lists them.",
    "--modules A [B ...]": "Layers with an expert: ends of names (q_proj), patterns, or all-linear.",
}
_TRAINING = {
    "--steps N": "Optimizer steps; without a length, 3 epochs.",
    "--learning_rate X": "Peak rate; each type of expert has its own default.",
    "--batch_size N": "Rows of a step, of all processes. (default: 8)",
    "--loss DPO": "Learn from rows with `chosen` and `rejected`.",
    "--acts_on answer": "Leave prompts to the base: quicker, for short answers.",
}
_APPLIED = {"--experts A [B ...]": "Experts to add to the base first."}
_ANSWERS = {"--max_new_tokens N": "The most tokens of an answer. (default: 64)"}
_RUN = {
    "--ckpt_path FILE": "Checkpoint to go on from; settings that are given beat its own.",
    "--seed N": "Seed of all random numbers. (default: 0)",
    "--trainer.NAME X": "Settings of the Trainer; --help-all lists them and all others.",
}


def options_of_run(verb: str) -> list[str]:
    """Return the names of the options of a command that runs a trainer."""
    alone = FIT_ALONE if verb == "fit" else ()
    return [*SHORT_NAMES, "model", "data", "trainer", "seed_everything", "ckpt_path", "device", *alone]


def help_texts(verb: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the options of a command with their texts, by the title of their section, and its examples."""
    line = f"modular-experts {verb} --base DIR --tasks a.jsonl"
    if verb != "fit":
        examples = [f"{line} --experts library/a", f"modular-experts {verb} --config configs/test.yaml"]
        return {"required": _PLACES, "options": _APPLIED | _ANSWERS | _RUN}, examples
    examples = [
        f"{line} --expert SparseExpert --modules q_proj v_proj --steps 100 --out library/a",
        "modular-experts fit --config configs/fit/sparse.yaml --steps 20",
        "modular-experts fit --expert.help SparseExpert",
    ]
    return {"required": _PLACES | _EXPERT, "options": OWN_OPTIONS | _TRAINING | _APPLIED | _RUN}, examples
