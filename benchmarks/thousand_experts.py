"""What would 1000 experts and 100 tasks of an 8B base take on a cluster, and where does it stop growing?

The numbers follow from the assumptions at the top, of which only `HANDLING` was measured (`engine_overhead.py`); no
expert is trained. The hours on a cluster come from a simulation of the study's pieces: each waits for what it
needs, for a GPU, for the program that hands out pieces, and for the file system.

    python benchmarks/thousand_experts.py [--quick]      a second
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from measuring import Parser
from rich.console import Console
from rich.table import Table

# The base: Llama 3's shape of 8B parameters.
LAYERS, HIDDEN, INNER, KEY_VALUE, PARAMETERS = 32, 4096, 14336, 1024, 8.03e9
SITES = [(HIDDEN, HIDDEN)] * 2 + [(KEY_VALUE, HIDDEN)] * 2 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)]
BASE_BYTES = 2 * PARAMETERS  # bfloat16
# The study: ten kinds of experts for each of 100 tasks, each tested on all tasks, and three merges of each group.
KINDS, TASKS, METHODS, GROUPS = 10, 100, 3, [10] * 10 + [100]
RANK, STEPS, BATCH, TOKENS = 16, 200, 16, 512
MERGE = 60.0  # seconds to compute a merge
ROWS, PROMPT, ANSWER, TEST_BATCH = 100, 300, 30, 16
# The machines: H100s of which a training reaches 35 %, and a file system for all.
FLOPS, DECODE_STEP = 0.35 * 989e12, 0.025  # seconds for one token of a batch, by transformers without a graph
START = 15.0  # seconds of a process until it reads its base
NODE_READS, ALL_READS = 2e9, 20e9  # bytes per second
# Measured: CPU seconds of the program for a piece that does nothing.
HANDLING = {"slurm": 0.006, "workers that stay": 0.004}


@dataclass(frozen=True)
class Work:
    """A piece: seconds on a GPU with the base loaded, bytes that it reads beside the base, and what it needs."""

    stage: str
    seconds: float
    reads: float
    writes: float
    needs: tuple[int, ...] = ()


def expert_bytes() -> float:
    """Return the bytes of a LoRA in float32."""
    return 4.0 * LAYERS * RANK * sum(out + into for out, into in SITES)


def train_seconds() -> float:
    """Return seconds of a training: two operations per parameter and token forward, and two backward to the inputs."""
    return 4 * PARAMETERS * STEPS * BATCH * TOKENS / FLOPS


def test_seconds() -> float:
    """Return seconds of a test on one task."""
    batches = -(-ROWS // TEST_BATCH)
    return 2 * PARAMETERS * ROWS * PROMPT / FLOPS + batches * ANSWER * DECODE_STEP


def plan(kinds: int = KINDS, tasks: int = TASKS, cut: int = 1) -> list[Work]:
    """Return the pieces of the study, in its order, with each test on all tasks cut into some pieces."""
    size, row = expert_bytes(), tasks * test_seconds() / cut
    dense = 4.0 * LAYERS * sum(out * into for out, into in SITES)
    pieces = [Work("tests", row, 0, 0)] * cut
    for _ in range(kinds):
        trained = []
        for _ in range(tasks):
            trained.append(len(pieces))
            pieces.append(Work("experts", train_seconds(), 0, size))
            pieces += [Work("tests", row, size, 0, (trained[-1],))] * cut
        for _ in range(METHODS):
            for number, count in enumerate(GROUPS):
                group = trained if count >= tasks else trained[number * count : (number + 1) * count]
                # A merge of all is stored. That of a group lives in memory, unless other pieces test it too.
                stored = dense * (count >= tasks or cut > 1)
                merged = len(pieces)
                pieces.append(Work("merges", MERGE + row, len(group) * size, stored, tuple(group)))
                pieces += [Work("tests", row, dense, 0, (merged,))] * (cut - 1)
    return pieces


def hours(pieces: Sequence[Work], gpus: int, handling: float, one_process_each: bool) -> float:
    """Return the hours until all pieces are done.

    Args:
        pieces: In the order in which they are handed out.
        gpus: How many run at once.
        handling: Seconds for which each piece keeps the program that hands them out.
        one_process_each: Whether each piece starts a process and reads the base; else a process of each GPU stays.
    """
    after: dict[int, list[int]] = {}
    blockers = [len(piece.needs) for piece in pieces]
    for number, piece in enumerate(pieces):
        for need in piece.needs:
            after.setdefault(need, []).append(number)
    ready = deque(number for number, left in enumerate(blockers) if not left)
    fresh, idle = gpus, 0  # GPUs without and with a process that holds the base
    ends: list[tuple[float, int]] = []
    now = program = disks = 0.0
    while ready or ends:
        while ready and (fresh or idle):
            number = ready.popleft()
            program = max(program, now) + handling
            loads = one_process_each or not idle
            fresh, idle = (fresh, idle - 1) if idle else (fresh - 1, idle)
            begin = program + START * loads
            read = pieces[number].reads + BASE_BYTES * loads
            # The file system serves one after another at its full rate, and a node takes at most its own.
            disks = max(disks, begin) + read / ALL_READS
            loaded = max(begin + read / NODE_READS, disks)
            heapq.heappush(ends, (loaded + pieces[number].seconds, number))
        now, number = heapq.heappop(ends)
        fresh, idle = (fresh + 1, idle) if one_process_each else (fresh, idle + 1)
        for later in after.get(number, ()):
            blockers[later] -= 1
            if not blockers[later]:
                ready.append(later)
    return now / 3600


def main() -> None:
    """Compute and print."""
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the experts, to see that it runs")
    kinds = KINDS // 10 if parser.parse_args().quick else KINDS
    pieces = plan(kinds)
    console = Console(width=100)
    table = Table("stage", "pieces", "seconds a piece", "GPU hours", "reads, TB", "writes, TB", title="by arithmetic")
    for stage in ("experts", "tests", "merges", "all"):
        mine = [piece for piece in pieces if stage in (piece.stage, "all")]
        seconds = sum(piece.seconds for piece in mine)
        numbers = [f"{seconds / len(mine):.0f}", f"{seconds / 3600:.0f}"]
        numbers += [f"{sum(getattr(piece, way) for piece in mine) / 1e12:.2f}" for way in ("reads", "writes")]
        table.add_row(stage, str(len(mine)), *numbers)
    console.print(table)
    print(f"an expert takes {expert_bytes() / 1e6:.0f} MB, the base {BASE_BYTES / 1e9:.0f} GB")
    print(f"processes of one piece read the base {len(pieces)} times: {len(pieces) * BASE_BYTES / 1e12:.1f} TB")
    longest = train_seconds() + MERGE + TASKS * test_seconds()
    print(f"no cluster is quicker than {longest / 60:.0f} minutes: a training, then a merge and its test on all tasks")
    work = sum(piece.seconds for piece in pieces) / 3600
    table = Table("GPUs", *(f"{name}{cut}" for name in HANDLING for cut in ("", ", tests cut in 5")))
    table.title = "by simulation: hours (share of them at work)"
    for gpus in (8, 64, 256, 1024):
        plans = [(plan(kinds, cut=cut), name) for name in HANDLING for cut in (1, 5)]
        found = [hours(cut, gpus, HANDLING[name], name == "slurm") for cut, name in plans]
        table.add_row(str(gpus), *(f"{one:.2f} ({work / one / gpus:.0%})" for one in found))
    console.print(table)


if __name__ == "__main__":
    main()
