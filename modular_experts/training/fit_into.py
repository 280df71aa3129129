"""Find changes of a fit's settings after which it takes no more memory than there is, cheapest first."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from modular_experts.text import bytes_text
from modular_experts.training.estimate import Change, FitEstimate
from modular_experts.training.module import ExpertModule

Settings = dict[str, dict[str, Any]]
"""Arguments of `ExpertModule`, `TaskMixture` and Lightning's `Trainer`, by `model`, `data` and `trainer`."""


class Saving(NamedTuple):
    """Settings with which a fit takes less memory."""

    options: str
    """The settings as the command takes them."""
    settings: Settings


Way = list[Saving]
"""Settings of one kind, such as smaller and smaller batches; each replaces the previous one."""


def changes_to_fit(
    most: int,
    estimate: FitEstimate,
    ways: Iterable[Way],
    predicted: Callable[[Settings], int],
) -> list[Change]:
    """Return changes after which the fit of an estimate takes at most `most` bytes; none if it does already.

    Each of the `ways` is tried on top of the earlier ones that help, and `predicted` returns the memory of the fit with
    their settings. Raise ValueError if all of them together are not enough.
    """
    peak = estimate.peak
    changes: list[Change] = []
    taken: Settings = {"model": {}, "data": {}, "trainer": {}}
    for way in ways:
        earlier = list(changes)
        for saving in way:
            if peak <= most:
                return changes
            tried = {group: taken[group] | saving.settings.get(group, {}) for group in taken}
            try:
                smaller = predicted(tried)
            except ValueError:  # such as values in bfloat16 of a full expert
                continue
            # Less than a hundredth is not worth a slower or a rounded fit.
            if smaller < 0.99 * peak:
                peak = smaller
                taken = tried
                changes = [*earlier, Change(saving.options, smaller)]
    if peak > most:
        tried_all = ""
        if changes:
            tried_all = f" and {bytes_text(peak)} with {' '.join(change.options for change in changes)}"
        raise ValueError(
            f"nothing makes this fit take at most {bytes_text(most)}: it takes {bytes_text(estimate.peak)}{tried_all}; "
            "take fewer layers, a smaller share of them, shorter rows or a smaller base"
        )
    return changes


def ways_to_fit(module: ExpertModule, batch_size: int, parts: int) -> Iterator[Way]:
    """Yield ways to take less memory, cheapest first; the steps of the fit and their rows stay the same.

    Gradient checkpointing costs a second forward pass, and a batch in parts makes each product smaller; a base in
    bfloat16 rounds what the experts are trained beside, and values in bfloat16 what is trained. A step has `parts`
    batches of `batch_size` rows.
    """
    if not module.gradient_checkpointing:
        yield [Saving("--model.gradient_checkpointing true", {"model": {"gradient_checkpointing": True}})]
    halves: Way = []
    while batch_size % 2 == 0:
        batch_size //= 2
        parts *= 2
        options = f"--batch_size {batch_size} --trainer.accumulate_grad_batches {parts}"
        smaller: Settings = {"data": {"batch_size": batch_size}, "trainer": {"accumulate_grad_batches": parts}}
        halves.append(Saving(options, smaller))
    yield halves
    if module.dtype_name == "float32":
        rounded: Settings = {"model": {"dtype": "bfloat16"}, "trainer": {"precision": "bf16-mixed"}}
        yield [Saving("--dtype bfloat16 --trainer.precision bf16-mixed", rounded)]
    if module.values == "float32":
        yield [Saving("--values bfloat16", {"model": {"values": "bfloat16"}})]
