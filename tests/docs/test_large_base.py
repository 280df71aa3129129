"""The commands of the guide train on a sharded base, with two processes on this machine, and all give one expert."""

import os
import re
import shlex
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed.run
import yaml
from testbed.forked import ended, forked, start_ranks
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import modular_experts.training.fit  # noqa: F401 - here, so that no copy of this process takes seconds for it
from modular_experts.__main__ import main
from modular_experts.library import Library

pytestmark = pytest.mark.ddp

GUIDE = Path(__file__).parents[2] / "docs/guides/large-base.md"
LAUNCHERS = ("modular-experts", "srun", "torchrun")


def command(*words: str) -> None:
    warnings.simplefilter("ignore")
    # Lightning's advice for losses that nobody has joined yet.
    warnings.filterwarnings("error", message=".*sync_dist=True.*")
    assert main(words) == 0


def node(words: list[str]) -> None:
    """Do what `torchrun` does on a node, with copies of this process as its processes."""

    def launch(config: LaunchConfig, entrypoint: str) -> Callable[..., object]:
        config.start_method, config.monitor_interval = "fork", 0.05
        return lambda *arguments: elastic_launch(config, command)(*arguments[arguments.index("fit") :])

    with patch("torch.distributed.run.elastic_launch", launch):
        torch.distributed.run.main(words)


def recipe(launcher: str, port: int) -> list[str]:
    """Return the guide's command for two processes on this machine."""
    blocks = re.findall(r"```text\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
    (found,) = [block for block in blocks if block.startswith(launcher) and "shard_base" in block]
    nodes = 2 if "num_nodes 2" in found else 1
    found = found.replace("\\\n", " ").replace("HOST:29500", f"127.0.0.1:{port}")
    return shlex.split(re.sub(r"(devices|per-node) 8", rf"\1 {2 // nodes}", found))


def started(words: list[str]) -> Iterator[int]:
    """Start the processes of a command as its launcher does, and yield their numbers."""
    own = {"GLOO_SOCKET_IFNAME": "lo"}
    if words[0] == "torchrun":
        yield from [forked(node, words[1:], **own) for _ in range(2)]
    elif words[0] == "srun":
        first, tasks = words.index("modular-experts"), words[words.index("--ntasks-per-node") + 1]
        job = {"JOB_ID": str(os.getpid()), "JOB_NAME": "sparse", "NTASKS": "2", "NTASKS_PER_NODE": tasks, "NNODES": "2"}
        for rank in range(2):
            place = {"PROCID": str(rank), "NODEID": str(rank), "LOCALID": "0", "NODELIST": "127.0.0.1"}
            own |= {f"SLURM_{name}": value for name, value in (job | place).items()}
            yield forked(command, *words[first + 1 :], **own)
    else:
        yield from start_ranks(command, *words[1:])


def test_each_recipe_trains_the_same_expert(two_task_files, one_block) -> None:
    config = {
        "model": {"base": str(one_block), "modules": ["q_proj"], "expert": {"class_path": "SparseExpert"}},
        "data": {"tasks": ["a.jsonl", "b.jsonl"], "batch_size": 4},
        "trainer": {"max_steps": 2, "limit_val_batches": 0, "accelerator": "cpu"},
    }
    Path("sparse.yaml").write_text(yaml.safe_dump(config))
    for number, launcher in enumerate(LAUNCHERS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            words = recipe(launcher, probe.getsockname()[1])
        processes = list(started([*words, "--out", f"library/{number}"]))
        assert [ended(one, 60) for one in processes] == [0, 0], launcher
    library = Library("library")
    assert len({library[str(number)].content_hash for number in range(len(LAUNCHERS))}) == 1
