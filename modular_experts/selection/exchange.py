"""Move experts to new supports, together with their values and the optimizer state of each trained entry."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from modular_experts.experts.selectable import Selectable
from modular_experts.masks.top_k import ascending
from modular_experts.native.sparse_passes import carried
from modular_experts.selection.choice import SelectableLayer


class Exchange:
    """Moves experts from one support to the next, and remembers the units that were trained."""

    def __init__(self) -> None:
        self.touched: dict[str, Tensor] = {}
        """The units of each weight that were trained and left; some may be back, or in it more than once."""

    def move(
        self,
        name: str,
        layer: SelectableLayer,
        units: Tensor,
        optimizers: Iterable[Optimizer],
        trained: bool = True,
        graded: bool = False,
    ) -> None:
        """Let the expert of the weight `name` keep other units, sorted, in place.

        The optimizers may hold state of its parameters. A random support before the first step was not `trained`. If
        the packed parameter's gradient does not belong to the new support yet (`graded`), the accumulated gradient
        moves along, and a newcomer's gradient starts from zero.
        """
        expert = layer.expert
        # A copy, for the expert changes its support in place.
        before = expert.support_units().clone()
        slots, gone = expert.reselect(layer.matrix, units)
        touched = before[:0]
        if trained:
            left = before[gone]
            touched = torch.cat([self.touched.get(name, touched).to(left), left])
        # A unit may leave many times, and sorting at each choice would take as long as the choice.
        self.touched[name] = touched if touched.numel() <= 4 * before.numel() else touched.unique()
        packed = expert.packed
        if packed is None:
            return
        for optimizer in optimizers:
            carry_state(optimizer.state.get(packed, {}), packed, slots)
        if packed.grad is not None and not graded:
            packed.grad.copy_(carried(packed.grad, slots))

    def ever_trained(self, name: str, expert: Selectable) -> Tensor:
        """Return the units `(k,)` of a weight that are trained now or were trained at any time, sorted."""
        units = expert.support_units()
        earlier = self.touched.get(name)
        if earlier is None or not earlier.numel():
            return units
        both = ascending(torch.cat([earlier.to(units), units]))
        is_new = both[1:] != both[:-1]
        return torch.cat([both[:1], both[1:][is_new]])


def carry_state(state: Mapping[str, object], parameter: Tensor, slots: Tensor) -> None:
    """Move an optimizer's state of the slots of a parameter to new slots, in place, also sums over a tile's rows.

    `slots` has for each new slot the one it had before, or -1 for a newcomer, which starts from zero.
    """
    for value in state.values():
        if isinstance(value, Tensor) and value.shape[:1] == parameter.shape[:1]:
            if not value.is_floating_point():
                raise ValueError(
                    "the optimizer keeps quantised moments, which cannot move to other entries; choose once, with "
                    "MaskSchedule(rule=SelectOnce()), or take an optimizer with moments in floating point"
                )
            value.copy_(carried(value, slots))


def optimizer_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Return the size of all per-entry state in bytes, without step counters."""
    size = 0
    for optimizer in optimizers:
        for state in optimizer.state.values():
            size += sum(value.nbytes for value in state.values() if isinstance(value, Tensor) and value.ndim > 0)
    return size
