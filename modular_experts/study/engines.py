"""Name the place where pieces of work run: this machine, SLURM, or an executor of the user's own."""

import inspect
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from modular_experts.study.parser import make
from modular_experts.study.processes import LocalProcesses
from modular_experts.study.slurm_jobs import SlurmJobs
from modular_experts.text import did_you_mean

ENGINES: dict[str, type[Executor]] = {"local": LocalProcesses, "slurm": SlurmJobs}


def engine(name: str = "local", **settings: object) -> Executor:
    """Return the executor of a name, for `run` of `study/run_pieces.py` and as a context manager.

    ```python
    with engine("slurm", partition="gpu", time=240, gres="gpu:1") as executor:
        run(pieces, store, executor)
    ```

    Args:
        name: `local`, `slurm`, or the dotted path of a class that is a `concurrent.futures.Executor`, or of a function
            that returns one, such as `mine.Pool` of a file `mine.py`.
        settings: What the class or function takes, by name (`LocalProcesses`, `SlurmJobs`).

    Raises:
        ValueError: No engine has this name or takes these settings, or it cannot start; the message says why.
    """
    if name not in ENGINES and "." not in name:
        raise ValueError(
            f"no engine has the name {name}; take {', '.join(ENGINES)}, or the dotted path of an Executor of your own"
            + did_you_mean(name, ENGINES)
        )
    kind = ENGINES.get(name) or make("`engine=`", type | Callable, name)
    try:
        inspect.signature(kind).bind(**settings)
    except TypeError as error:
        known = [name for name in inspect.signature(kind).parameters if name != "options"]
        wrong = next((setting for setting in settings if setting not in known), "")
        raise ValueError(
            f"the engine {name}: {error}; it takes {', '.join(known) or 'nothing'}" + did_you_mean(wrong, known)
        ) from None
    return kind(**settings)


@dataclass(frozen=True)
class Where:
    """Where pieces of work run.

    Args:
        processes: How many pieces run at once on this machine; by default one per CUDA device, else one per core (at
            most 8), and never more than fit into memory with twice the base each.
        engine: `local`, `slurm` or a dotted path. Pieces run there; the path names a class of yours, an Executor of
            concurrent.futures, or a function that returns one.
        engine_settings: What the engine takes. For slurm these are options of sbatch by name, such as
            {partition: gpu}, and a few of its own.
    """

    processes: int | None = None
    engine: str = "local"
    engine_settings: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.processes is not None and (self.engine != "local" or self.engine_settings):
            other = "`engine_settings=`" if self.engine == "local" else f"`engine={self.engine}`"
            raise ValueError(f"`processes=` is for this machine as it comes, beside {other}; leave one of them out")

    def made(self) -> Executor | None:
        """Return the engine, or None for the processes of this machine as they come."""
        if self.engine == "local" and not self.engine_settings:
            return None
        return engine(self.engine, **(self.engine_settings or {}))
