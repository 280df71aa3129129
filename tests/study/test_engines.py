"""Each engine runs the same pieces to the same bytes, and reports failures as the processes of this machine do."""

import importlib.util
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modular_experts.reports.json_lines import JSONLines
from modular_experts.study.engines import engine
from modular_experts.study.piece import KilledError, Piece
from modular_experts.study.run_pieces import run_pieces
from modular_experts.study.slurm_jobs import Call


def numbers(seed: int) -> dict[str, Any]:
    """Return sums whose last bits depend on the number of threads, and what the process finds around it."""
    import torch

    noise = torch.Generator().manual_seed(seed)
    found = torch.randn(300, 300, generator=noise).matmul(torch.randn(300, 300, generator=noise)).tanh()
    return {"sums": found.sum(0)[:5].tolist(), "threads": torch.get_num_threads(), "directory": os.getcwd()}


def refuse(number: int) -> None:
    raise ValueError(f"{number} is below zero")


def die() -> None:
    time.sleep(0.5)  # so that others run beside it
    os.kill(os.getpid(), signal.SIGKILL)


def wait_first(place: str) -> str:
    """Write the process into a file and wait there for long, but not if the file is there already."""
    file = Path(place)
    if not file.exists():
        file.write_text(str(os.getpid()))
        time.sleep(60)
    return "done"


def wait_for(file: Path) -> int:
    while not file.exists() or not file.read_text():
        time.sleep(0.05)
    return int(file.read_text())


@pytest.mark.cluster
def test_a_cluster_gives_the_bytes_of_this_machine_and_fails_as_it_does(cluster, tmp_path) -> None:
    pieces = [Piece(("die",), die), *(Piece(("numbers", seed), numbers, (seed,)) for seed in range(6))]
    pieces += [Piece(("refuse",), refuse, (-1,)), Piece(("after",), numbers, (7,), needs=(("refuse",),))]
    name, settings = cluster
    found = {}
    for one, wanted in (("local", {"processes": 2}), (name, settings)):
        file = tmp_path / f"{one}.jsonl"
        with engine(one, **wanted) as executor:
            found[one] = run_pieces(pieces, JSONLines(file), executor)
    here, there = found["local"], found[name]
    # Pieces finish in another order, so lines are compared and not files.
    lines = [sorted((tmp_path / f"{one}.jsonl").read_bytes().splitlines()) for one in found]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 6
    assert here.results["numbers", 0]["threads"] == 1
    assert there.failures.keys() == here.failures.keys() == {("die",), ("refuse",)}
    assert there.skipped == here.skipped == {("after",): ("refuse",)}
    for outcome in (here, there):
        assert isinstance(outcome.failures["die",], BrokenExecutor)
        assert repr(outcome.failures["refuse",]) == "ValueError('-1 is below zero')"
        trace = "".join(traceback.format_exception(outcome.failures["refuse",]))
        assert "in refuse" in trace, "the trace of the other process is lost"


@pytest.mark.cluster
def test_slurm_runs_a_preempted_job_again(slurm_started, tmp_path) -> None:
    with engine("slurm", folder=tmp_path / "jobs", poll_seconds=0.3, partition="low") as executor:
        waiting = executor.submit(wait_first, str(tmp_path / "process"))
        first = wait_for(tmp_path / "process")
        subprocess.run(
            ["sbatch", "--wait", "--partition=high", "--exclusive", "--wrap=true", "-o/dev/null"], check=True
        )
        # SLURM lets a job that it sent back wait for two minutes.
        job = subprocess.check_output(["squeue", "--me", "--noheader", "--format=%i"], text=True).strip()
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
        assert waiting.result(60) == "done"
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
    assert not list((tmp_path / "jobs").glob("*.pkl")), "files of jobs that succeeded are left"


@pytest.mark.cluster
def test_slurm_cancels_its_jobs_on_an_error_and_refuses_wrong_options(slurm_started, tmp_path) -> None:
    settings = {"folder": tmp_path / "jobs", "poll_seconds": 0.3}
    with suppress(KeyboardInterrupt), engine("slurm", **settings) as executor:
        executor.submit(wait_first, str(tmp_path / "process"))
        wait_for(tmp_path / "process")
        raise KeyboardInterrupt
    assert not list((tmp_path / "jobs").glob("*.pkl"))
    end = time.monotonic() + 20
    while subprocess.run(["squeue", "--noheader"], capture_output=True, check=True).stdout:
        assert time.monotonic() < end, "the job lives on"
        time.sleep(0.2)
    with engine("slurm", partition="gpu", **settings) as executor:
        refused = executor.submit(abs, -1).exception(20)
    assert re.search("[Ii]nvalid partition", str(refused))


def test_the_lines_of_the_guide_run_pieces_on_the_workers_of_dask(tmp_path, monkeypatch) -> None:
    """Where dask is not installed, a pool of threads stands in the place of its workers."""
    guide = (Path(__file__).parents[2] / "docs/guides/clusters.md").read_text()
    (block,) = re.findall(r'```python title="dask_pool.py"\n(.*?)```', guide, re.DOTALL)
    assert len(block.splitlines()) <= 10
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dask_pool.py").write_text(block)
    with ExitStack() as stack:
        address = "tcp://here"
        if importlib.util.find_spec("distributed"):
            local = importlib.import_module("distributed").LocalCluster
            started = local(1, threads_per_worker=1, dashboard_address=None)
            address = stack.enter_context(started).scheduler_address
        else:
            client = SimpleNamespace(get_executor=lambda **options: ThreadPoolExecutor(1))
            monkeypatch.setitem(sys.modules, "distributed", SimpleNamespace(Client=lambda address: client))
        with engine("dask_pool.workers", address=address) as executor:
            assert run_pieces([Piece(("a",), abs, (-1,))], executor=executor).results == {("a",): 1}


def test_a_job_finds_modules_and_files_beside_the_user(tmp_path, monkeypatch) -> None:
    pytest.importorskip("cloudpickle")
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


class Unpicklable(Exception):
    """Two arguments, of which a pickle keeps one."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def stumble() -> None:
    raise Unpicklable(1, 2)


def test_an_error_of_a_job_has_its_type_its_words_and_its_trace_and_keeps_its_words_if_it_cannot_travel() -> None:
    pytest.importorskip("cloudpickle")
    sentences = {"ValueError('7 is below zero')": (refuse, 7), "RuntimeError('Unpicklable: 1 and 2')": (stumble,)}
    for wanted, (function, *given) in sentences.items():
        succeeded, error = pickle.loads(pickle.dumps(Call(function, given, {})()))
        assert not succeeded
        assert repr(error) == wanted
        assert f"in {function.__name__}" in error.__notes__[0]


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("slrum", {}, r"no engine has the name slrum; take local, slurm, .* did you mean slurm\?"),
        ("local", {"proceses": 2}, r"the engine local: .*'proceses'; it takes .*devices; did you mean processes\?"),
        ("no_such_engines.Pool", {}, r"`engine=`: no_such_engines.Pool cannot be imported: No module named"),
    ],
)
def test_an_engine_that_does_not_exist_is_one_sentence(name: str, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        engine(name, **settings)


def test_a_kill_that_concerns_one_piece_fails_it_at_once_and_stops_nothing() -> None:
    """An executor that knows which piece was killed is not made to run it again alone."""
    runs = []

    class Knowing(ThreadPoolExecutor):
        def submit(self, fn, /, *args) -> Future:
            runs.append(fn)
            if fn is not die:
                return super().submit(fn, *args)
            future: Future = Future()
            future.set_exception(KilledError("job 3 was killed"))
            return future

    with Knowing(2) as executor:
        found = run_pieces([Piece(("die",), die), *(Piece((n,), abs, (n,)) for n in (1, 2))], executor=executor)
    assert str(found.failures["die",]) == "job 3 was killed"
    assert runs == [die, abs, abs]
