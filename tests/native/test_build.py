"""Compiled code: made once, kept, and one line of the log where it cannot be made."""

import ctypes
import logging
import shutil
import subprocess
from pathlib import Path

import pytest

from modular_experts.native import build as compiled
from modular_experts.native.build import load_compiled

SOURCES = sorted(Path(compiled.__file__).parents[1].rglob("*.cpp"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source of one function, whose library would go to a folder of its own."""
    if not any(map(shutil.which, compiled.COMPILERS)):
        pytest.skip("there is no C++ compiler here")
    file = tmp_path / "seven.cpp"
    file.write_text('#include "seven.h"\nextern "C" int seven() { return SEVEN; }\n')
    file.with_suffix(".h").write_text("// nothing yet\n")
    return file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept" / "modular_experts"


def test_each_source_with_its_flags_is_compiled_once_and_that_is_said_once(source, folder, caplog) -> None:
    with caplog.at_level(logging.INFO, logger=compiled.__name__):
        for _ in range(2):
            library = load_compiled(source, "-DSEVEN=7")
            assert isinstance(library, ctypes.CDLL)
            assert library.seven() == 7
    (line,) = caplog.messages
    assert line.startswith("Compiled seven.cpp in ")
    (kept,) = folder.iterdir()
    assert kept.suffix == ".so"
    assert load_compiled(source, "-DSEVEN=8").seven() == 8
    source.with_suffix(".h").write_text("#undef SEVEN\n#define SEVEN 6\n")
    assert load_compiled(source, "-DSEVEN=7").seven() == 6
    source.write_text('extern "C" int seven() { return 9; }\n')
    assert load_compiled(source, "-DSEVEN=7").seven() == 9
    assert len(list(folder.iterdir())) == 4


def test_our_three_sources_have_no_warning(source) -> None:
    assert [file.name for file in SOURCES] == ["kept_gradients.cpp", "products.cpp", "sparse_passes.cpp"]
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-unused-parameter"]
    compiler = next(filter(None, map(shutil.which, compiled.COMPILERS)))
    command = [compiler, "-std=c++17", "-march=native", "-fsyntax-only", *strict, *SOURCES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_next_compiler_takes_over_from_one_whose_library_cannot_be_loaded(source, monkeypatch) -> None:
    """A C compiler compiles C++, and leaves out the library that exceptions need."""
    monkeypatch.setenv("CXX", "gcc" if shutil.which("gcc") else "cc")
    source.write_text('extern "C" int seven() { try { throw 7; } catch (int number) { return number; } }\n')
    assert load_compiled(source).seven() == 7


def test_without_a_compiler_one_line_says_why(monkeypatch, caplog) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO, logger=compiled.__name__):
        assert load_compiled(Path("seven.cpp")) is None
    (line,) = caplog.messages
    assert line.startswith("seven.cpp is not used: there is no C++ compiler")


@pytest.mark.parametrize("broken", ["source", "folder"])
def test_a_failed_compilation_is_one_line_with_the_reason(source, tmp_path, monkeypatch, caplog, broken) -> None:
    if broken == "folder":
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(source))
    with caplog.at_level(logging.INFO, logger=compiled.__name__):
        assert load_compiled(source, *(["-DSEVEN=7"] if broken == "folder" else [])) is None
    (line,) = caplog.messages
    assert line.startswith("seven.cpp is not used, as ")
    assert {"source": "SEVEN", "folder": "Not a directory"}[broken] in line
