"""A call finds on another machine what it had here, and its error comes back as it was raised there."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path

import pytest

from modular_experts.jobs.remote import Call, settle, settled_by

pytest.importorskip("cloudpickle", reason="cloudpickle comes with dask, submitit and the extra ray")


class Unpicklable(Exception):
    """Two arguments, of which a pickle keeps one."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def stumble() -> None:
    raise Unpicklable(1, 2)


def refuse() -> None:
    raise ValueError("seven is odd")


def test_a_call_finds_modules_and_files_beside_the_user(tmp_path, monkeypatch) -> None:
    (tmp_path / "beside.py").write_text("def read():\n    return open('word').read()\n")
    (tmp_path / "word").write_text("hello")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import beside

    Path("call").write_bytes(pickle.dumps(Call(beside.read, (), {})))
    program = f"import pickle; print(pickle.load(open({str(tmp_path / 'call')!r}, 'rb'))())"
    where = {"cwd": "/", "env": os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}}
    found = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, **where)
    assert found.stdout == "(True, 'hello')\n"


def test_an_error_has_its_type_its_words_and_its_trace() -> None:
    future: Future = Future()
    settle(future, Call(refuse, (), {})())
    assert repr(future.exception()) == "ValueError('seven is odd')"
    assert "in refuse" in str(future.exception().__cause__)


def test_an_error_that_cannot_travel_keeps_its_words() -> None:
    succeeded, (error, _) = pickle.loads(pickle.dumps(Call(stumble, (), {})()))
    assert not succeeded
    assert repr(error) == "RuntimeError('Unpicklable: 1 and 2')"


def test_a_cancelled_future_cancels_the_one_of_the_cluster_and_the_other_way_it_breaks() -> None:
    inner: Future = Future()
    settled_by(inner, lambda error: error).cancel()
    assert inner.cancelled()
    inner = Future()
    outer = settled_by(inner, lambda error: error)
    inner.cancel()
    with pytest.raises(BrokenExecutor, match="does its scheduler still run"):
        outer.result(0)


def test_an_error_of_the_cluster_is_explained() -> None:
    inner: Future = Future()
    outer = settled_by(inner, lambda error: BrokenExecutor(f"lost: {error}"))
    inner.set_exception(OSError("worker"))
    assert repr(outer.exception()) == "BrokenExecutor('lost: worker')"
