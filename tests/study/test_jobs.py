"""Pieces of work run once each, failures stay alone, and no process outlives its program."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from modular_experts.reports.json_lines import JSONLines
from modular_experts.study.piece import Piece
from modular_experts.study.processes import LocalProcesses
from modular_experts.study.run_pieces import run_pieces


def square(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is below zero\nand this is a second line")
    return number * number


def die(number: int) -> int:
    """End the process at once, as the system does to one that takes too much memory."""
    time.sleep(0.2)  # so that others run beside it
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def threads(_: int) -> int:
    import torch

    return torch.get_num_threads()


def pieces(*numbers: int) -> list[Piece]:
    return [Piece(("square", number), square, (number,)) for number in numbers]


def test_results_come_by_key_which_no_two_pieces_share_and_progress_counts_them() -> None:
    seen = []
    with ThreadPoolExecutor(2) as pool:
        found = run_pieces(pieces(1, 2, 3), executor=pool, progress=lambda *now: seen.append(now[:2]))
    assert found.results == {("square", 1): 1, ("square", 2): 4, ("square", 3): 9}
    assert not found.failures
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    found.raise_failures()
    with pytest.raises(ValueError, match=r"two pieces have the key square 2; give each a key of its own"):
        run_pieces(pieces(1, 2, 2))


def test_a_piece_whose_result_is_stored_is_not_run_again_and_one_that_failed_is(tmp_path) -> None:
    file, seen = tmp_path / "new" / "results.jsonl", []
    with ThreadPoolExecutor(1) as pool:
        run_pieces(pieces(1, 2), JSONLines(file), pool)
        again = run_pieces(pieces(1, 2, 3), JSONLines(file), pool, lambda *now: seen.append(now[:2]))
    assert again.results == {("square", 3): 9}
    assert seen == [(2, 3), (3, 3)]
    assert dict(JSONLines(file)) == {("square", number): number**2 for number in (1, 2, 3)}
    store = {("square", 1): 1}
    with ThreadPoolExecutor(1) as pool:
        assert run_pieces(pieces(1, -1), store, pool).failures.keys() == {("square", -1)}
        store["square", -1] = 1
        assert not run_pieces(pieces(1, -1), store, pool).failures


def test_a_line_that_was_not_finished_is_replaced_by_the_next_result(tmp_path) -> None:
    file = tmp_path / "results.jsonl"
    store = JSONLines(file)
    store["a", 1], store["b", 0.5] = {"x": 1}, [2]
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    torn = JSONLines(file)
    assert dict(torn) == {("a", 1): {"x": 1}}
    torn["b", 0.5] = [2]
    assert file.read_bytes() == whole


def test_two_writers_of_one_file_keep_each_others_results(tmp_path) -> None:
    file = tmp_path / "results.jsonl"
    one, other = JSONLines(file), JSONLines(file)
    for number in range(4):
        (one, other)[number % 2]["a", number] = number
    assert dict(JSONLines(file)) == dict(other) == {("a", number): number for number in range(4)}
    assert ("a", 3) not in one


def test_a_failure_leaves_the_others_alone_and_is_named_at_the_end(tmp_path) -> None:
    store = JSONLines(tmp_path / "results.jsonl")
    with ThreadPoolExecutor(2) as pool:
        found = run_pieces(pieces(-1, 2, -3, 4), store, pool)
    assert set(store) == found.results.keys() == {("square", 2), ("square", 4)}
    assert found.failures.keys() == {("square", -1), ("square", -3)}
    with pytest.raises(RuntimeError, match=r"^2 of 4 pieces failed, first square -\d: .* is below zero") as raised:
        found.raise_failures()
    assert isinstance(raised.value.__cause__, ValueError), "the trace of the first failure is not shown"


def meet(place: str, number: int) -> str:
    """Wait until three calls have come, so that each has a process of its own, and return the device that it sees."""
    Path(place, str(number)).touch()
    while len(os.listdir(place)) < 3:
        time.sleep(0.01)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_processes_have_one_thread_and_one_device_and_a_killed_one_fails_only_its_own_piece(tmp_path) -> None:
    work = [Piece(("die",), die, (0,)), *pieces(*range(6)), Piece(("threads",), threads, (0,))]
    with LocalProcesses(3, devices=["5", "GPU-7"]) as pool:
        devices = [pool.submit(meet, str(tmp_path), number) for number in range(3)]
        assert sorted(one.result(60) for one in devices) == ["5", "5", "GPU-7"]
        found = run_pieces(work, executor=pool)
    assert found.failures.keys() == {("die",)}
    assert isinstance(found.failures["die",], BrokenProcessPool)
    assert found.results == {("square", n): n * n for n in range(6)} | {("threads",): 1}


def test_an_interruption_ends_the_processes_at_once_and_takes_back_what_waits() -> None:
    def interrupt(done: int, total: int, piece: Piece | None) -> None:
        if done:
            raise KeyboardInterrupt

    began = time.monotonic()
    pool = LocalProcesses(2)
    with pytest.raises(KeyboardInterrupt), pool:
        run_pieces([*pieces(1), Piece(("sleep",), time.sleep, (60,))], executor=pool, progress=interrupt)
    assert time.monotonic() - began < 50
    started = threading.Event()
    waiting: list[Future] = []

    class Counting(ThreadPoolExecutor):
        def submit(self, *args, **kwargs) -> Future:
            waiting.append(super().submit(*args, **kwargs))
            return waiting[-1]

    with Counting(1) as pool, pytest.raises(KeyboardInterrupt):
        run_pieces([*pieces(1), Piece(("wait",), started.wait, (1,)), *pieces(2)], executor=pool, progress=interrupt)
    assert waiting[-1].cancelled()


PROGRAM = """
import os, signal, time
from modular_experts.study.processes import LocalProcesses

def work():
    signal.signal(signal.SIGTERM, lambda *_: None)  # as Lightning does while it trains
    print("at work", flush=True)
    time.sleep(30)
    os._exit(0)

if __name__ == "__main__":
    with LocalProcesses(1) as pool:
        pool.submit(work)
"""


def test_a_process_at_work_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"at work\n"
        process.kill()
        # Reading ends when the last process that could write there does.
        reader = threading.Thread(target=process.stdout.read, daemon=True)
        reader.start()
        reader.join(20)
        assert not reader.is_alive(), "the process at work lives on"


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells how much memory is free")
def test_no_more_processes_run_than_fit_into_memory() -> None:
    assert LocalProcesses(devices=range(3)).processes == min(3, LocalProcesses(devices=range(8)).processes)
    assert LocalProcesses(bytes_each=10**18).processes == 1
    free = int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    assert LocalProcesses(bytes_each=free * 2 // 5, devices=range(8)).processes in (1, 2)
    assert LocalProcesses(4, bytes_each=10**18).processes == 4
