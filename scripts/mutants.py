"""Break the package on purpose, one line at a time, and show that a test notices each time.

    python scripts/mutants.py tests/mutants/methods.yaml ...      the mutants of some rooms
    python scripts/mutants.py                                     all of them

A mutant is an entry of a YAML list: `file`, the exact text to `find` there (once), what to `replace` it with, the
`tests` that must fail then (arguments of pytest), and `why` it would matter. Each is made in a copy of the tree, so an
interruption leaves nothing behind.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "modular_experts",
    "tests",
    "scripts",
    "benchmarks",
    "configs",
    "docs",
    "Makefile",
    "mkdocs.yml",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="lists of mutants; all of them if none is given")
    everywhere = [*ROOT.glob("tests/mutants/*.yaml"), *ROOT.glob("tests/systems/*/mutants.yaml")]
    files = parser.parse_args().files or sorted(everywhere)
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.is_file():
                shutil.copy(source, tree / name)
        for file in files:
            for mutant in yaml.safe_load(file.read_text(encoding="utf-8")):
                survivors += not dies(tree, mutant)
    print(f"{survivors} mutants survived" if survivors else "every mutant died")
    return 1 if survivors else 0


def dies(tree: Path, mutant: dict[str, str]) -> bool:
    """Make one mutant in the copied tree, run its tests, and undo it; return whether a test failed."""
    path = tree / mutant["file"]
    text = path.read_text(encoding="utf-8")
    if text.count(mutant["find"]) != 1:
        sys.exit(
            f"{mutant['file']} holds {mutant['find']!r} {text.count(mutant['find'])} times; a mutant must name it once"
        )
    path.write_text(text.replace(mutant["find"], mutant["replace"]), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant["tests"].split()]
    # Hypothesis draws most examples in CI.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}
    try:
        code = subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode
    finally:
        path.write_text(text, encoding="utf-8")
    verdict = {0: "SURVIVED", 1: "died"}.get(code, f"pytest ended with {code}")
    print(f"{verdict:10} {mutant['file']}: {mutant['why']}", flush=True)
    return code == 1


if __name__ == "__main__":
    sys.exit(main())
