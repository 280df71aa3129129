"""The pages of `docs/` run as they stand, lead where they say, and name everything that is public.

A page is a script: blocks with a title are files, Python blocks and the commands of console blocks run in the order of
the page, in a directory that has what the tutorial has made before: a base, task files and two experts. SmolLM2 is a
tiny random model here, trainings take two steps, and the examples have a fifth of their rows.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import generate_docs
import pytest
import yaml
from testbed.documents import ROOT, few_examples, short
from testbed.here import STUDY, work_here

import modular_experts
from modular_experts.__main__ import VERBS, main
from modular_experts.library import open_expert
from modular_experts.methods import METHODS

DOCS = ROOT / "docs"
GENERATED = {name for name in generate_docs.MAKERS if name.endswith(".md")}
WRITTEN = sorted({path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - GENERATED)
SCRIPTS = [page for page in WRITTEN if page.split("/")[0] in ("index.md", "tutorial", "guides", "concepts")]


def _blocks(text: str) -> list[tuple[str, str, str]]:
    """Return language, title and content of each fenced block."""
    fenced = r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$'
    return re.findall(fenced, text, re.MULTILINE | re.DOTALL)


def _run_command(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "modular-experts":
        assert main(words[1:]) == 0, line
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), line
    else:
        assert words[0] in ("pip", "source", "git", "cd"), f"{line}: nothing tests this command"


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory, tiny_llama_dir) -> Path:
    """The directory as the tutorial leaves it."""
    place = tmp_path_factory.mktemp("tutorial")
    (place / ".cache").mkdir()
    (place / ".cache/smollm2").symlink_to(tiny_llama_dir)
    (place / "configs").symlink_to(ROOT / "configs")
    few_examples(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", ["modular-experts"])
        for task in ("dates", "mood"):
            tasks = json.dumps([{"name": task, "path": f"examples/{task}.jsonl"}])
            export = [{"class_path": "ExportExpert", "init_args": {"library": "library", "name": task}}]
            expert = ["--model.modules", "[q_proj,v_proj]", "--model.expert", "SparseExpert", "--data.tasks", tasks]
            run = ["--trainer.max_steps", "2", "--trainer.callbacks", json.dumps(export)]
            assert main(["fit", "--model.base", ".cache/smollm2", *expert, *run]) == 0
    return place


@pytest.fixture
def place(tutorial, tmp_path, monkeypatch) -> Path:
    """A copy of that directory, which a page may change."""
    shutil.copytree(tutorial, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here"), *sys.path])
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    work_here(monkeypatch, *STUDY)
    return tmp_path / "here"


@pytest.mark.filterwarnings("ignore")  # what Lightning says about a trainer that a reader makes
@pytest.mark.parametrize("page", SCRIPTS)
def test_a_page_runs_from_top_to_bottom(page: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    if page == "tutorial/train.md":
        shutil.rmtree("library")  # this page makes the experts that the others have
    names = types.ModuleType("page")
    sys.modules["page"] = names  # pickle and dataclasses look classes up in their module
    titles = []
    try:
        for language, title, content in _blocks((DOCS / page).read_text(encoding="utf-8")):
            if title:
                Path(title).write_text(short(content), encoding="utf-8")
                titles.append(Path(title).stem)
                sys.modules.pop(titles[-1], None)  # another page's file of that name
            elif language == "python":
                exec(compile(short(content), page, "exec"), vars(names))
            elif language == "console":
                for line in content.replace("\\\n", "").splitlines():
                    if line.startswith("$ "):
                        _run_command(short(line[2:]))
            else:
                assert language in ("text", "json", "yaml"), (
                    f"{page}: nobody runs a block of {language or 'no language'}"
                )
    finally:
        for name in ("page", *titles):
            sys.modules.pop(name, None)


def _anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as the site makes them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_every_link_and_anchor_leads_somewhere() -> None:
    texts = {page: (DOCS / page).read_text(encoding="utf-8") for page in WRITTEN} | generate_docs.pages()
    for page, text in texts.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            if re.match(r"https?://|mailto:|data:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (DOCS / page).parent.joinpath(path).resolve().relative_to(DOCS).as_posix() if path else page
            assert target in texts or (DOCS / target).is_file(), f"{page}: {link} leads nowhere"
            assert not anchor or anchor in _anchors(texts[target]), f"{page}: {link} has no such heading"


def test_the_navigation_lists_every_page_once() -> None:
    listed = [page for _, page in generate_docs.nav()]
    assert sorted(listed) == sorted({*WRITTEN, *GENERATED})


def test_the_reference_has_every_public_name() -> None:
    reference = "\n".join((DOCS / page).read_text() for page in WRITTEN if page.startswith("reference/"))
    documented = re.findall(r"^::: (\S+)$", reference, re.MULTILINE)
    assert not {name for name in modular_experts.__all__ if not name.startswith("__")} - {
        path.rpartition(".")[2] for path in documented
    }
    for path, members in re.findall(r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?", reference, re.MULTILINE):
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        for member in filter(None, members.split(", ")):
            assert hasattr(found, member) or member in found.__annotations__, f"{path} has no {member}"


def test_the_generated_pages_have_every_method_command_and_file() -> None:
    made = generate_docs.pages()
    assert set(re.findall(r"^## (\w+)$", made["reference/methods.md"], re.MULTILINE)) == set(METHODS)
    assert set(re.findall(r"^## ([\w-]+)$", made["reference/commands.md"], re.MULTILINE)) == set(VERBS)
    shown = made["reference/configs.md"]
    assert all(file.read_text().strip() in shown for file in (ROOT / "configs/merge").glob("*.yaml"))
    assert "Default" in made["reference/methods.md"]


def test_the_file_format_names_every_key(tutorial: Path) -> None:
    page = (DOCS / "concepts/library.md").read_text()
    record = open_expert(tutorial / "library/dates").record
    assert not [key for key in record if f"`{key}`" not in page]


def test_the_invariants_name_tests_that_exist() -> None:
    for file, test in re.findall(r"`(tests/\S+\.py)::(\w+)`", (DOCS / "concepts/invariants.md").read_text()):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"


def test_the_site_is_built_anew_and_the_base_beside_the_cache_of_its_builder_stays(tmp_path: Path) -> None:
    """`make docs` in a small project with one public name; a base lies where `make smollm2` puts it."""
    programs = Path(sys.executable).parent
    if not (programs / "zensical").exists():
        pytest.skip("zensical builds the site; `make docs` brings it")
    config = {"site_name": "small", "plugins": [{"mkdocstrings": {"handlers": {"python": {"paths": ["."]}}}}]}
    files = {
        "Makefile": (ROOT / "Makefile").read_text(encoding="utf-8"),
        "mkdocs.yml": json.dumps(config),
        "docs/index.md": "# A name\n\n::: named.first\n",
        "scripts/generate_docs.py": "",
        ".cache/smollm2/model.safetensors": "the base",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for sentence in ("Count to one.", "Count to two."):
        (tmp_path / "named.py").write_text(f'def first():\n    """{sentence}"""\n', encoding="utf-8")
        command = ["make", "docs", f"BIN={programs}", "PIP=true", "RUNS="]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        assert sentence in (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert (tmp_path / ".cache/smollm2/model.safetensors").read_text() == "the base"


def test_the_configuration_of_the_site_asks_nobody_on_the_network() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert config["theme"]["font"] == "false"
    assert "extra_javascript" not in config
