"""Define a piece of work, and the account of failures."""

from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field

from modular_experts.reports.json_lines import Key, key_text


@dataclass(frozen=True)
class Piece:
    """A piece of work: a function of its settings, under a key.

    Args:
        key: Names the piece among all pieces of a run, such as `("experts", "lora", "reverse")`.
        function: Computes the result from the `arguments` alone. It must be importable, because a process of its own
            runs it, and the same arguments must give the same result.
        needs: The keys of pieces that must have a result before this one runs.
        given: The pieces in `needs` whose results the function gets as further arguments.
    """

    key: Key
    function: Callable[..., object]
    arguments: tuple[object, ...] = ()
    needs: tuple[Key, ...] = ()
    given: tuple[Key, ...] = ()

    def __str__(self) -> str:
        return key_text(self.key)


class KilledError(BrokenExecutor):
    """The process of one call ended without a result, such as for its memory; other calls are not concerned."""


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        total: Number of pieces.
        results: The results that this run computed, by key; the store has earlier runs' results too.
        failures: The error of each piece that failed, by key.
        skipped: The failed piece that each piece needs, directly or through others, and so did not run.
    """

    total: int
    results: dict[Key, object] = field(default_factory=dict)
    failures: dict[Key, BaseException] = field(default_factory=dict)
    skipped: dict[Key, Key] = field(default_factory=dict)

    def raise_failures(self) -> None:
        """Raise a RuntimeError with the first failure as its cause, if any piece failed."""
        if self.failures:
            key, error = next(iter(self.failures.items()))
            raise RuntimeError(
                f"{len(self.failures)} of {self.total} pieces failed, first {key_text(key)}: {error}; run the same "
                "again to retry only these"
            ) from error
