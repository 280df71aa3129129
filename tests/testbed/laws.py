"""The law of calls: the same call gives the same, whatever ran before it, and seeds matter where something is drawn."""

from collections.abc import Callable

from lightning.pytorch import seed_everything


def check_calls(call: Callable[[int, bool], object], seed_matters: bool) -> None:
    """Call with the seeds 1 and 2 and used objects, then with seed 1 and fresh ones, and compare what comes back.

    Args:
        call: Gets a seed, and whether to make all objects anew.
        seed_matters: Whether another seed must give another result; it must give the same one otherwise.
    """
    first = call(1, False)
    other = call(2, False)
    fresh = call(1, True)
    assert fresh == first, "a call with fresh objects differs from calls with used ones"
    assert (other != first) == seed_matters, "another seed must matter exactly where something is drawn"
    assert not seed_matters or call(1, False) == first, "the second call with the same seed differs"


def without_seed(made: Callable[[bool], object]) -> Callable[[int, bool], object]:
    """Return the call of a function that has no seed, with a seed for the global generators, which it must not read."""

    def call(seed: int, fresh: bool) -> object:
        seed_everything(seed, verbose=False)
        return made(fresh)

    return call
