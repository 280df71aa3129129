"""Define a random case: what it draws from, where it writes, what it compares, and how it ends."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

from torch import Tensor

Outcome = Literal["held", "refused", "MISMATCH", "CRASH"]


class Mismatch(AssertionError):
    """The package and the reference differ."""


@dataclass
class Case:
    """One random case.

    `random` is the only source of chance, so a family and a seed always give the same case. Files go into `folder`,
    which is empty, and `facts` are the settings that were drawn, for the line that is printed.
    """

    family: str
    seed: int
    folder: Path
    random: Random = field(init=False)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = Random(f"{self.family}/{self.seed}")

    def chance(self, share: float) -> bool:
        """Return true in this share of cases."""
        return self.random.random() < share

    def note(self, **facts: Any) -> None:
        """Keep what was drawn, for the line of this case."""
        self.facts.update(facts)

    def need(self, holds: bool, text: str) -> None:
        """Raise `Mismatch` with the text if a claim does not hold."""
        if not holds:
            raise Mismatch(text)

    def close(self, ours: Tensor, reference: Tensor, text: str, relative: float = 2e-5, absolute: float = 1e-7) -> None:
        """Raise `Mismatch` unless the tensors differ by at most a share of the reference's largest entry."""
        self.need(ours.shape == reference.shape, f"{text}: shape {tuple(ours.shape)}, not {tuple(reference.shape)}")
        if reference.numel() == 0:
            return
        error = (ours.double() - reference.double()).abs().max().item()
        size = reference.double().abs().max().item()
        self.need(
            error <= relative * size + absolute, f"{text}: differs by {error:.3g}, the largest entry is {size:.3g}"
        )


@dataclass(frozen=True)
class Ending:
    """How a case ended: it held, a sentence refused it, the numbers differ, or it raised what is no sentence."""

    outcome: Outcome
    text: str
    seconds: float


def end_of(case: Case, function: Callable[[Case], None]) -> Ending:
    """Run a case to its end, whatever that is."""
    started = time.perf_counter()
    outcome: Outcome = "held"
    text = ""
    try:
        function(case)
    except Mismatch as error:
        outcome, text = "MISMATCH", str(error)
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        outcome, text = "refused", f"{type(error).__name__}: {error}"
    except Exception:
        outcome, text = "CRASH", traceback.format_exc()
    return Ending(outcome, text, time.perf_counter() - started)
