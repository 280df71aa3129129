"""Move a loaded model to `base + sum_i c_i d_i`, with a coefficient for each expert and weight, or row of a weight.

The sum is linear in a coefficient, so its gradient is an inner product, `dL/dc_i = <dL/dW, d_i>`, or one of a row:
autograd needs no graph through the sum, and one dense gradient exists at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modular_experts.base.apply import apply_deltas
from modular_experts.base.structure import weight_of
from modular_experts.deltas import Delta, Sparse, add
from modular_experts.deltas.algebra import dot, dot_by_row, scale_rows


class Combination:
    """A model and the experts that are added to it, inside a `with` that restores the model bit for bit.

    Args:
        model: The experts' base, before anything is injected.
        experts: Name and delta of each weight, by expert; the deltas move to the model's device.
        merges: The first `merges` experts are merges of the others.

    Attributes:
        names: The weights that move, sorted.
        rows: Number of rows of each of these weights.
        experts: Number of experts, merges among them.
        merges: Number of merges.

    Raises:
        ValueError: A weight does not exist in the model, has another shape there or in another expert, or is tied to
            another one.
    """

    def __init__(self, model: PreTrainedModel, experts: Sequence[Mapping[str, Delta]], merges: int = 0) -> None:
        held = [dict(expert) for expert in experts]
        shapes: dict[str, torch.Size] = {}
        for name, delta in sorted((item for expert in held for item in expert.items()), key=lambda item: item[0]):
            if shapes.setdefault(name, delta.shape) != delta.shape:
                both = f"{tuple(shapes[name])} and {tuple(delta.shape)}"
                raise ValueError(f"two experts disagree on the shape of {name}: {both}")
        # Adds zeros: refuses names and shapes that do not fit the model.
        apply_deltas(model, [{name: Sparse.zero(shape) for name, shape in shapes.items()}])
        assert 0 <= merges <= len(held), (merges, len(held))
        self.names = list(shapes)
        self.experts = len(held)
        self.merges = merges
        self.rows = [shape[0] if shape else 1 for shape in shapes.values()]
        self._model = model
        self._weights = [weight_of(model, name) for name in shapes]
        # The deltas of each weight that are not zero, by the expert's number.
        self._deltas: list[dict[int, Delta]] = []
        for name in shapes:
            own = {number: expert[name].to(model.device) for number, expert in enumerate(held) if name in expert}
            self._deltas.append({number: delta for number, delta in own.items() if not delta.is_empty})
        self._base: list[Tensor] = []

    def __enter__(self) -> Self:
        self._base = [weight.detach().clone() for weight in self._weights]
        return self

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for weight, base in zip(self._weights, self._base, strict=True):
            weight.copy_(base)
        self._base = []

    @torch.no_grad()
    def move_to(self, coefficients: Tensor) -> None:
        """Set every weight to its base plus the experts' deltas times their coefficients.

        The sum is taken in at least float32 and rounded once to the weight's dtype.

        Args:
            coefficients: `(weights, experts)`, or one for each row of every weight, weight after weight:
                `(sum(rows), experts)`.
        """
        assert self._base, "move_to needs the `with` of its combination"
        for weight, base, scaled in zip(self._weights, self._base, self._scaled(coefficients), strict=True):
            total = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
            for delta in scaled:
                delta.add_to(total)
            weight.copy_(total)

    def deltas(self, coefficients: Tensor) -> Iterator[tuple[str, Delta]]:
        """Yield each weight's name and the delta of `move_to`, on the CPU, in the cheapest form that holds it."""
        for name, weight, scaled in zip(self.names, self._weights, self._scaled(coefficients), strict=True):
            yield name, add([Sparse.zero(weight.shape, weight.device), *scaled]).to("cpu")

    def _scaled(self, coefficients: Tensor) -> Iterator[Iterator[Delta]]:
        """Yield for each weight the deltas times their coefficients, without those whose coefficients are all zero."""
        if len(coefficients) == len(self.names):
            for factors, deltas in zip(coefficients.tolist(), self._deltas, strict=True):
                yield (delta * factors[expert] for expert, delta in deltas.items() if factors[expert])
            return
        for own, deltas in zip(coefficients.split(self.rows), self._deltas, strict=True):
            yield (scale_rows(delta, own[:, expert]) for expert, delta in deltas.items() if own[:, expert].any())

    @contextmanager
    def gradients(self, by_row: bool = False) -> Iterator[Tensor]:
        """Yield the coefficients' gradient, float64, summed over the backward passes inside.

        It is `(weights, experts)`, or by row `(sum(rows), experts)`. With bfloat16 weights it is the gradient at the
        sum before rounding.
        """
        count = sum(self.rows) if by_row else len(self.names)
        gathered = torch.zeros(count, self.experts, dtype=torch.float64)
        wanted = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        self._model.requires_grad_(False)
        hooks = []

        def gather(weight: Tensor, own: Tensor, place: int) -> None:
            assert weight.grad is not None
            # Widened once for all experts, which takes less than widening what each of them keeps.
            gradient = weight.grad.to(torch.promote_types(weight.grad.dtype, torch.float32))
            # One dense gradient exists at a time.
            weight.grad = None
            for expert, delta in self._deltas[place].items():
                own[:, expert] += (dot_by_row if by_row else dot)(gradient, delta).to(own.device)

        for place, own in enumerate(gathered.split(self.rows if by_row else 1)):
            weight = self._weights[place]
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(partial(gather, own=own, place=place)))
        try:
            yield gathered
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, before in wanted.items():
                parameter.requires_grad_(before)
