"""Find the experts that a schedule trains, and give those that a step leaves out gradients of zero."""

from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from modular_experts.experts import Expert
from modular_experts.injection import expert_layers

if TYPE_CHECKING:  # callbacks import lightning, which experts do not need
    from modular_experts.selection.schedule import TrainedModule

E = TypeVar("E", bound=Expert)


def experts_of(module: "TrainedModule", kind: type[E], owner: str) -> dict[str, E]:
    """Return the experts of all layers by their weight's name; raise ValueError if one is of another type."""
    experts: dict[str, E] = {}
    for name, layer in expert_layers(module.model):
        if not isinstance(layer.expert, kind):
            raise ValueError(
                f"{owner} is for {kind.__name__}, and {name} has a {type(layer.expert).__name__}; give "
                f"`expert={kind.__name__}`, or leave {owner} out"
            )
        experts[name] = layer.expert
    return experts


def zero_gradients(out: Tensor, expert: Expert) -> Tensor:
    """Return the output of a layer, so that a backward pass gives all parameters of its expert a gradient, if of zero.

    DDP waits for the gradient of each parameter, also of one that a step leaves out.
    """
    idle = sum((0 * parameter.flatten()[0] for parameter in expert.parameters()), start=out.new_zeros(()))
    return out + idle.to(out.dtype)
