"""One merge, watched, in a process of its own: what `merge_speed.py` and `merge_scale.py` measure.

The process imports what it needs, and then the work begins that counts: CPU seconds and memory. It may be
that of another Python, so everything but the standard library is imported where it is used.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main", "watch"]

Work = Callable[[], Any]
CHUNK = 1 << 22
SAMPLE_SECONDS = 0.01
HERE = Path(__file__).parent


def watch(python: str, kind: str, **task: Any) -> dict[str, Any]:
    """Run a work of `KINDS` in a process of its own, on one thread, and return what it took.

    Args:
        python: The interpreter.
        kind: Which work.
        task: What that work needs.

    Returns:
        `cpu` in seconds; `peak`, `anonymous` (both with the imports) and `anonymous_before`, the latter
        after the imports, in bytes; `found`, what the work returned.

    Raises:
        RuntimeError: The process failed; the message ends with the last lines that it wrote.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, "-W", "ignore", "-c", "import merge_work; merge_work.main()", json.dumps({"kind": kind, **task})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind} failed in {python}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Do the work that the first argument describes, and print what it took."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: this ends when who started it does
    task = json.loads(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        took = _watched(KINDS[task.pop("kind")](**task))
    print(json.dumps(took))


def _watched(work: Work) -> dict[str, Any]:
    samples, over = [status("RssAnon")], threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            samples.append(status("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    cpu = time.process_time()
    try:
        found = work()
        took = {"cpu": time.process_time() - cpu}
    finally:
        over.set()
        sampler.join()
    memory = {"peak": status("VmHWM"), "anonymous": max(samples), "anonymous_before": samples[0]}
    return took | memory | {"found": found}


def status(field: str) -> int:
    """Return a field of memory of this process, in bytes; unlike getrusage, it knows nothing of the parent's."""
    return 1024 * int(re.findall(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def _imports() -> None:
    """Import what would else be imported in the middle of the work, and leave torch one thread."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)


def by_mergekit(recipe: dict[str, Any], out: str) -> Work:
    """mergekit's merge of full checkpoints, with the options that a careful user of a CPU takes."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    _imports()
    configuration = MergeConfiguration.model_validate(recipe)
    options = MergeOptions(lazy_unpickle=True, copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
    return lambda: run_merge(configuration, out, options)


def by_experts(
    method: str, settings: dict[str, Any], experts: Sequence[str], base: str, out: str, check: bool = False
) -> Work:
    """Our merge of stored experts, written as a full checkpoint."""
    from modular_experts import methods
    from modular_experts.base import Base
    from modular_experts.library import open_experts
    from modular_experts.merging.merged import Merged

    _imports()

    def work() -> None:
        opened = open_experts(experts)
        merged = Merged(opened, getattr(methods, method)(**settings))
        Base.open(base, opened).write(merged, out, verify=check, overwrite=True)

    return work


def by_copying(files: Sequence[str], hashed: Sequence[str], written: str, out: str) -> Work:
    """What no merge can do without: reading its inputs, hashing those that are checked, writing as much as a result.

    Args:
        files: What is read.
        hashed: What is read and hashed.
        written: The file whose size is written, from the memory that it was read into.
        out: Where.
    """
    place = memoryview(bytearray(CHUNK))

    def work() -> None:
        for file in [*files, *hashed]:
            digest = hashlib.sha256() if file in hashed else None
            with open(file, "rb", buffering=0) as source:
                while count := source.readinto(place):
                    if digest:
                        digest.update(place[:count])
        left = Path(written).stat().st_size
        with open(out, "wb", buffering=0) as target:
            while left:
                left -= target.write(place[: min(CHUNK, left)])

    return work


def comparison(first: str, second: str, base: str) -> Work:
    """How far two checkpoints agree: entries that differ, as a share of all and of those that either one moved."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)

    def tensors(directory: str) -> dict[str, Any]:
        files = [safe_open(file, "pt") for file in sorted(Path(directory).glob("*.safetensors"))]
        return {key: file for file in files for key in file.keys()}  # noqa: SIM118 - not a dict

    def work() -> dict[str, float]:
        sides, unequal, moved, total = [tensors(place) for place in (first, second, base)], 0, 0, 0
        if len({frozenset(side) for side in sides}) > 1:
            raise ValueError(f"{first} and {second} hold other tensors")
        for key in sides[0]:
            one, other, start = (side[key].get_tensor(key) for side in sides)
            if one.dtype != other.dtype or one.shape != other.shape:
                raise ValueError(f"{key} is {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}")
            unequal += int(torch.count_nonzero(one != other))
            moved += int(torch.count_nonzero((one != start) | (other != start)))
            total += one.numel()
        return {"unequal": unequal / total, "unequal_of_moved": unequal / moved if moved else 0.0}

    return work


KINDS: dict[str, Callable[..., Work]] = {
    "mergekit": by_mergekit,
    "experts": by_experts,
    "copying": by_copying,
    "comparison": comparison,
}
