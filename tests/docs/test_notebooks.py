"""notebooks/: each runs from first to last cell without a warning, and is committed as it ran on a real base."""

import re
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
from run_notebooks import METADATA, NOTEBOOKS, code_cells, execute, read
from testbed.documents import short

from modular_experts.__main__ import main
from modular_experts.library import Library

MACHINE = re.compile(r"(?<![\w.:/<])/\w[\w.-]*/|\b[A-Z]:\\|site-packages|\bfile:")  # an absolute path, of any machine
LARGEST = 200_000  # bytes of a file


@pytest.fixture
def place(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A project of two directories: the notebooks, and a base that has learned nothing."""
    for name in ("runs/quickstart/base", ".cache/smollm2"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(tiny_llama_dir)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def test_notebooks_run_as_they_are_committed(place: Path) -> None:
    """From their own directory or from the root, they print and draw in the same cells, and leave nothing behind.

    One kernel runs them all, as it imports torch once. Trainings take two steps here, and scores four words.
    """
    quick, committed = [], [read(file) for file in NOTEBOOKS]
    for file, folder in zip(NOTEBOOKS, ("notebooks", ".", "notebooks"), strict=True):
        # A notebook sets levels of loggers, which outlive its names.
        loud = "import logging\n\nlogging.getLogger('modular_experts').setLevel(0)"
        fresh = nbformat.v4.new_code_cell(f"%reset -f\nimport os\n{loud}\nos.chdir({str(place / folder)!r})")
        quick += [fresh, *code_cells(read(file))]
    for number, cell in enumerate(quick):
        cell.source = short(cell.source).replace("eval_batch_size=", "eval_limit=4, eval_batch_size=")
        cell.id = str(number)
    ran = iter(code_cells(execute(nbformat.v4.new_notebook(cells=quick), place)))
    for notebook in committed:
        begun = next(ran).execution_count
        for ours in code_cells(notebook):
            theirs = next(ran)
            assert _kinds(theirs) == _kinds(ours), theirs.source
            assert theirs.execution_count - begun == ours.execution_count
            if ".rows()" in ours.source:  # made from a seed, so the same on every base
                assert _text(theirs) == _text(ours)
    left = sorted(path.name for path in place.rglob("*"))
    assert left == [".cache", "base", "notebooks", "quickstart", "runs", "smollm2"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_committed_notebook_was_run_in_order_and_holds_nothing_of_a_machine_or_an_hour(notebook: Path) -> None:
    content = read(notebook)
    cells = code_cells(content)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert content.metadata == METADATA
    assert not any(cell.metadata for cell in content.cells)
    for text in (text for cell in content.cells for text in (cell.source, _text(cell))):
        assert not MACHINE.search(text), text
    assert notebook.stat().st_size < LARGEST


@pytest.mark.parametrize("notebook", NOTEBOOKS[:2], ids=lambda file: file.stem)
def test_without_a_base_the_first_cell_says_what_to_run(notebook: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no runs/quickstart/base yet: run `make quickstart` in the"):
        exec(code_cells(read(notebook))[0].source, {})


def test_the_commands_of_the_second_work_with_its_cells_as_a_file(place: Path, monkeypatch, capsys) -> None:
    cells = read(NOTEBOOKS[1]).cells
    own = [cell.source for cell in cells if cell.source.startswith("# mine.py\n")]
    (place / "mine.py").write_text("\n\n\n".join(own), encoding="utf-8")
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    shown = re.findall(r"^```bash\n(.*?)^```$", "\n".join(cell.source for cell in cells), re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line)[1:] for line in "\n".join(shown).replace("\\\n", "").split("\n\n")]
    assert [command[0] for command in commands] == ["fit", "fit", "merge"]
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["modular-experts", *command])
        assert main(["2" if part == "50" else part for part in command]) == 0, capsys.readouterr()
    library = Library("library")
    assert library["ends"].record["kind"] == "GainedLoRA"
    assert library["ends"].record["hyperparameters"]["rank"] == 8
    assert library["both"].record["method"]["class_path"] == "mine.MagnitudeWeighted"
    assert library["both"].record["method"]["init_args"]["power"] == 2.0


def _kinds(cell: nbformat.NotebookNode) -> list[tuple[str, ...]]:
    """Return what a cell put out: texts by their stream, pictures by their formats; lines of progress come early."""
    return sorted((one.output_type, one.get("name", ""), *sorted(one.get("data", {}))) for one in cell.outputs)


def _text(cell: nbformat.NotebookNode) -> str:
    """Return what a cell printed, and the words that stand for its pictures."""
    outputs = cell.get("outputs", [])
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)
