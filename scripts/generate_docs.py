"""Write the pages of the site that come from elsewhere: merge methods, commands, configurations, notebooks, changes.

    python scripts/generate_docs.py

`make docs` runs it before it builds `mkdocs.yml`. What it writes under `docs/` is not committed.
"""

import contextlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from modular_experts.__main__ import VERBS, main
from modular_experts.methods import METHODS
from modular_experts.methods.method import PROMISES, documentation

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def pages() -> dict[str, str]:
    """Return the text of each generated page by its path below `docs/`."""
    return {name: make() for name, make in MAKERS.items()}


def methods_page() -> str:
    """Return the page of all merge methods: formula, properties, settings with their defaults, source."""
    rows, parts = [], []
    sources: dict[Any, str] = {}
    for name, kind in sorted(METHODS.items(), key=lambda item: item[0].lower()):
        about, settings = documentation(kind)
        formula = " ".join(about.split("\n\n")[0].split()).partition(": ")[2]
        rows.append(f"| [`{name}`](#{name.lower()}) | {formula} |")
        made: Any = None
        with contextlib.suppress(TypeError):  # a method without a default for some setting
            made = kind()
        defaults = vars(made) if made is not None else {}
        lines = [f"## {name}", about, "**Settings**"]
        for setting, text in settings.items():
            value = f" (`{defaults[setting]!r}`)" if setting in defaults else ""
            lines.append(f"- `{setting}`{value}: {text}")
        module = inspect.getmodule(kind)
        first = sources.setdefault(module, name)
        source = inspect.getdoc(module) if first == name else f"As for [{first}](#{first.lower()})."
        lines += ["**Source**", source or ""]
        parts.append("\n\n".join(lines).replace("\n\n- ", "\n- ").replace("**Settings**\n-", "**Settings**\n\n-"))
    head = (
        "# Merge methods\n\nA method makes one delta of the deltas that several experts have for one weight. "
        f"`d_i` is the delta of expert i. {PROMISES} On the command line a method is `--method TIES`, and a setting "
        "`--method.keep 0.1`; `modular-experts methods TIES` prints what stands here. Which one to take is in "
        "[Choose a merge](../guides/choose-a-merge.md); how they compare, in "
        "[Which merge keeps most](../results/merging.md).\n\n| method | merged delta |\n|---|---|\n"
    )
    return head + "\n".join(rows) + "\n\n" + "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """Return the page of the command line: the output of `--help`, in 80 columns."""
    parts = [
        "# Command line",
        "Each command prints this page's text with `--help-all`, and a screen of it with `--help`. A command that is "
        "one function of the library has the "
        "name of that function ([Python functions](python.md)).",
        _block(_printed(["--help"])),
    ]
    for verb in VERBS:
        parts += [
            f"## {verb}",
            _block(_printed([verb, "--help" if verb in ("validate", "test", "predict") else "--help-all"])),
        ]
    return "\n\n".join(parts) + "\n"


def _printed(argv: list[str]) -> str:
    """Return what a command prints, in 80 columns and without colours."""
    narrow = mock.patch.dict(os.environ, {"COLUMNS": "80", "NO_COLOR": "1"})
    # A parser leaves by itself when it has printed its help.
    with narrow, contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(argv)
    assert out.getvalue(), f"{' '.join(argv)} printed nothing"
    return out.getvalue()


def configs_page() -> str:
    """Return the page of the files in `configs/`, each with its text."""
    parts = [
        "# Configuration files",
        "One YAML file is one run. Every option of a command is a key of its file, nested at the dots "
        "(`--data.batch_size 8` is `data: {batch_size: 8}`), and `--print_config` prints a complete file. Several "
        "`--config` files compose: a later one beats an earlier one, and the command line beats all of them. A class "
        "is its name or dotted path (`expert: SparseExpert`), with settings `class_path` and `init_args`.",
        "These files run as they stand in the directory that `modular-experts quickstart` was run in; the files of the "
        "paper are in [The paper](../guides/paper.md).",
    ]
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        if "paper" not in file.parts:
            name = file.relative_to(ROOT).as_posix()
            parts += [f"## {name}", _block(file.read_text(encoding="utf-8"), "yaml")]
    return "\n\n".join(parts) + "\n"


def paper_page() -> str:
    """Return the page about the paper's experiment, which stands beside its configuration files."""
    return (ROOT / "configs/paper/README.md").read_text(encoding="utf-8")


def changes_page() -> str:
    """Return the change log; its links lead into the repository's `docs/`, which is the site."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("# Changelog", "# Changes", 1)
    return re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)


def notebook_page(name: str) -> str:
    """Return a notebook with its outputs, as it was run."""
    parts = []
    for cell in json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else _block(text, "python"))
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append(_block("".join(output["text"])))
            elif "image/png" in output.get("data", {}):
                parts.append(f"![What the cell draws](data:image/png;base64,{output['data']['image/png'].strip()})")
            else:
                parts.append(_block("".join(output["data"]["text/plain"])))
    return "\n\n".join(parts) + "\n"


def _block(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def nav() -> list[tuple[str, str]]:
    """Return title and path of each page of the site, in the order of its navigation."""
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    found: list[tuple[str, str]] = []

    def add(title: str, to: Any) -> None:
        if isinstance(to, str):
            found.append((title, to))
            return
        for entry in to:
            # The page that stands for a whole section has no title of its own.
            for name, below in entry.items() if isinstance(entry, dict) else [(title, entry)]:
                add(name, below)

    add("", config["nav"])
    return found


def llms_txt() -> str:
    """Return the list of pages for readers that are programs (llmstxt.org)."""
    lines = [f"- [{title}]({page})" for title, page in nav()]
    about = "Train experts for a frozen language model, keep them in a library, merge them, and measure the merge."
    return "# modular-experts\n\n> " + about + "\n\n" + "\n".join(lines) + "\n"


MAKERS: dict[str, Callable[[], str]] = {
    "tutorial/notebook-1.md": partial(notebook_page, "01-train-merge-look.ipynb"),
    "tutorial/notebook-2.md": partial(notebook_page, "02-your-own-expert-and-merge-method.ipynb"),
    "tutorial/notebook-3.md": partial(notebook_page, "03-on-colab.ipynb"),
    "guides/paper.md": paper_page,
    "reference/methods.md": methods_page,
    "reference/commands.md": commands_page,
    "reference/configs.md": configs_page,
    "changes.md": changes_page,
    "llms.txt": llms_txt,
}

if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"docs/{name}", file=sys.stderr)
