"""A piece runs after those that it needs, a failure stops only what needs it, and no interruption loses a result."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modular_experts.reports.json_lines import JSONLines
from modular_experts.study.piece import Piece
from modular_experts.study.run_pieces import run_pieces

DONE: list[str] = []


def do(name: str) -> str:
    if name == "bad":
        raise ValueError("bad is bad")
    time.sleep(0.01 * (name == "slow"))
    DONE.append(name)
    return name


def graph(**needs: str) -> list[Piece]:
    """Return a piece for each name, which needs the pieces of the words behind it."""
    return [Piece((name,), do, (name,), tuple((word,) for word in words.split())) for name, words in needs.items()]


@pytest.fixture(autouse=True)
def _forget() -> None:
    DONE.clear()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_piece_runs_after_all_that_it_needs(threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        found = run_pieces(graph(last="left right", right="slow", left="", slow=""), executor=pool)
    assert found.results.keys() == {("last",), ("right",), ("left",), ("slow",)}
    assert DONE.index("slow") < DONE.index("right") < DONE.index("last") == 3
    assert DONE.index("left") < 3


def test_what_is_ready_first_in_the_list_goes_first_and_needs_a_stored_result() -> None:
    store = {("a",): "a"}
    with ThreadPoolExecutor(1) as pool:
        run_pieces(graph(a="", b="a", c=""), executor=pool)
        # All that may run is handed to an executor of unknown size at once.
        assert DONE == ["a", "c", "b"]
        assert run_pieces(graph(a="", d="a"), store, pool).results == {("d",): "d"}
    assert DONE == ["a", "c", "b", "d"]


def test_a_failure_stops_only_what_needs_it_directly_or_through_others() -> None:
    seen: list[tuple[int, str]] = []
    failed: list[tuple[str, str]] = []
    work = graph(top="middle good", middle="bad", bad="", good="", beside="good")
    with ThreadPoolExecutor(2) as pool:
        found = run_pieces(
            work,
            executor=pool,
            progress=lambda done, total, piece: seen.append((done, str(piece))),
            failed=lambda piece, error: failed.append((str(piece), str(error))),
        )
    assert sorted(DONE) == ["beside", "good"]
    assert found.failures.keys() == {("bad",)}
    assert found.skipped == {("middle",): ("bad",), ("top",): ("bad",)}
    assert failed == [("bad", "bad is bad")]
    assert [done for done, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert {name for _, name in seen[1:]} == {"top", "middle", "bad", "good", "beside"}


def test_a_need_that_is_not_there_and_a_circle_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^b needs c, which is not among the pieces; add it$"):
        run_pieces(graph(a="", b="c"))
    with pytest.raises(ValueError, match=r"^pieces wait for each other: (a needs b needs a|b needs a needs b); take"):
        run_pieces(graph(a="b", b="a"))


FULL = """
import os, resource
from modular_experts.reports.json_lines import JSONLines
store = JSONLines("results.jsonl")
for number in range(3):
    store["piece", number] = "x" * 100
size = os.path.getsize("results.jsonl")
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
try:
    store["piece", 3] = "y" * 100
except OSError as error:
    print(error)
    assert ("piece", 3) not in store
assert os.path.getsize("results.jsonl") == size + 10
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert len(JSONLines("results.jsonl")) == 3
store["piece", 4] = "z"
"""


def test_a_full_disk_ends_in_a_sentence_and_loses_nothing(tmp_path: Path) -> None:
    """The limit on a file's size cuts a line in the middle, as a disk does that has room for a part of it."""
    done = subprocess.run([sys.executable, "-c", FULL], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "no result could be stored (File too large): 'results.jsonl'" in done.stdout
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"][1] for line in lines] == [0, 1, 2, 4]


def test_a_piece_gets_the_results_that_it_is_given_also_those_of_an_earlier_run(tmp_path) -> None:
    def joined(own: str, *given: str) -> str:
        return " ".join([own, *given])

    work = graph(a="", b="", unseen="")
    needs = (("a",), ("unseen",), ("b",))
    work.append(Piece(("all",), joined, ("own",), needs, given=(("b",), ("a",))))
    with ThreadPoolExecutor(2) as pool:
        assert run_pieces(work, executor=pool).results["all",] == "own b a"
        store = JSONLines(tmp_path / "results.jsonl")
        run_pieces(work[:2], store, pool)
        assert run_pieces(work, store, pool).results == {("unseen",): "unseen", ("all",): "own b a"}
