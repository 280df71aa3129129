"""Notebooks: each run from its first cell to its last in a kernel of its own, where a warning is an error.

`python tests/docs/run_notebooks.py` runs those in notebooks/ on the base of `make quickstart`, and stores what they
print and draw without anything that belongs to one machine or one hour. Do so after a change of a cell. An argument
names the directory that holds `runs/quickstart`, if it is not the project's root.
"""

import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STRICT = """\
import warnings

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "The `srun` command is available on your system")  # as in pyproject.toml
warnings.filterwarnings("ignore", "There is no current event loop")  # of tornado, from Python 3.12 on
warnings.filterwarnings("ignore", module="ipykernel")  # it warns of its own doings when it shuts down
"""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(file: Path) -> nbformat.NotebookNode:
    """Return a notebook, once it is known to be a valid one."""
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(notebook: nbformat.NotebookNode, place: Path) -> nbformat.NotebookNode:
    """Run a notebook in a directory and return it with its outputs; what belongs to the kernel is gone afterwards.

    Args:
        notebook: It is changed in place.
        place: The kernel's working directory.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised an error, or a warning.
    """
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, _surroundings(Path(folder))):
        client = NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(place)}},
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],  # it would warn that it is reached by TCP on this machine
        )
        client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _surroundings(folder: Path) -> dict[str, str]:
    """Return an environment in which the kernel is this Python, and nothing of the user's is read or written."""
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "warnings.py").write_text(STRICT)
    (folder / "temporary").mkdir()
    return {
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "TMPDIR": str(folder / "temporary"),
    }


if __name__ == "__main__":
    for file in NOTEBOOKS:
        nbformat.write(execute(read(file), Path(*sys.argv[1:] or [ROOT])), file)
        print(file.relative_to(ROOT))
