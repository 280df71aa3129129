"""Put experts into the linear layers of a model, take them out again, and save what was trained.

`inject.py` swaps the layers' classes; open it first. `save.py` writes the experts of any training loop into a library.
Which site gets which expert is a plan (`experts/site.py`).
"""

from modular_experts.injection.inject import (
    ExpertConv1D,
    ExpertLayer,
    ExpertLinear,
    describe_experts,
    eject,
    expert_layers,
    expert_state,
    find_sites,
    inject,
    load_expert_state,
    penalty,
    task_vector,
    write_experts,
)

__all__ = [
    "ExpertConv1D",
    "ExpertLayer",
    "ExpertLinear",
    "describe_experts",
    "eject",
    "expert_layers",
    "expert_state",
    "find_sites",
    "inject",
    "load_expert_state",
    "penalty",
    "task_vector",
    "write_experts",
]
