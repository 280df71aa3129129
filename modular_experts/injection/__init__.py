"""Put experts into the linear layers and other modules of a model, take them out again, and save what was trained.

`inject.py` swaps the layers' classes, which `layers.py` and `slices.py` define; open it first. `save.py` writes the
experts of any training loop into a library. Which site gets which expert is a plan (`experts/site.py`).
`routed.py` puts experts behind a router, `ensemble.py` averages what experts predict, and `attach.py` puts stored
experts of any kind into a model for a while.
"""

from modular_experts.injection.inject import (
    context_length,
    draw_experts,
    eject,
    expert_layers,
    expert_state,
    extra_losses,
    find_sites,
    inject,
    load_expert_state,
    moves_tokens_alone,
    named_experts,
    task_vector,
    write_experts,
)
from modular_experts.injection.layers import ExpertLayer
from modular_experts.injection.save import describe_experts

__all__ = ["ExpertLayer", "context_length", "describe_experts", "draw_experts", "eject", "expert_layers"]
__all__ += ["expert_state", "extra_losses", "find_sites", "inject", "load_expert_state", "moves_tokens_alone"]
__all__ += ["named_experts", "task_vector", "write_experts"]
