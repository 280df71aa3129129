"""Run SLURM's own daemons on this machine, for as long as a command or a test takes.

    python tests/testbed/slurm.py squeue

Debian has them: `apt-get install slurmctld slurmd slurm-client munge`. The cluster has one node of four processors, and
two partitions: `low`, the default one, and `high`, whose jobs send jobs of `low` back to the queue.
"""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
CONF = """
ClusterName=testbed
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=2
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 State=UP
"""


def is_installed() -> bool:
    """Return whether SLURM's daemons and munge are there."""
    return all(_path(name) for name in NEEDED)


@contextmanager
def slurm() -> Iterator[Path]:
    """Start munge and a SLURM of one node, set `SLURM_CONF`, and end them; return their directory."""
    with ExitStack() as stack:
        # Sockets need a short path.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm")))
        folder.chmod(0o755)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = dict(zip(("controller_port", "node_port"), _free_ports(), strict=True))
        conf = folder / "slurm.conf"
        conf.write_text(CONF.format(folder=folder, host=socket.gethostname(), user=getpass.getuser(), **ports))
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(conf)
        stack.callback(lambda: os.environ.pop("SLURM_CONF") and before and os.environ.update(SLURM_CONF=before))
        places = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{option}={folder / file}" for option, file in places.items()]
        _daemon(stack, ["munged", "--foreground", "--force", f"--key-file={key}", *options])
        _until(lambda: (folder / "munge.socket").exists(), "munged", folder)
        _daemon(stack, ["slurmctld", "-D", "-f", str(conf)])
        _daemon(stack, ["slurmd", "-D", "-f", str(conf)])
        _until(lambda: _says(["sinfo", "--noheader", "--format=%T"]).startswith("idle"), "slurmd", folder)
        stack.callback(lambda: subprocess.run(["scancel", "--me", "--signal=KILL"], check=False))
        yield folder


def _path(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _daemon(stack: ExitStack, command: list[str]) -> None:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([_path(command[0]) or command[0], *command[1:]], stdout=quiet, stderr=quiet)
    stack.callback(process.wait)
    stack.callback(process.terminate)


def _says(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _until(ready: Callable[[], bool], name: str, folder: Path) -> None:
    end = time.monotonic() + 30
    while not ready():
        if time.monotonic() > end:
            logs = "".join(f"\n{log.name}:\n{log.read_text()[-2000:]}" for log in folder.glob("*.log"))
            raise RuntimeError(f"{name} did not start in 30 seconds{logs}")
        time.sleep(0.1)


def _free_ports() -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    with slurm():
        sys.exit(subprocess.run(sys.argv[1:], check=False).returncode)
