"""An expert trains something at one linear layer, and states the delta it stands for; each type has a file.

Open `expert.py` first, the contract of a type of your own; then `lora.py`, the shortest type. `selectable.py` has what
types that train a chosen part of a weight share, `site.py` which layer gets which expert.
"""

from modular_experts.experts.expert import Expert
from modular_experts.experts.full import FullExpert
from modular_experts.experts.lora import LoRAExpert
from modular_experts.experts.masked import MaskedExpert
from modular_experts.experts.module_expert import ModuleExpert
from modular_experts.experts.site import Plan, Site
from modular_experts.experts.sparse import SparseExpert

__all__ = ["Expert", "FullExpert", "LoRAExpert", "MaskedExpert", "ModuleExpert", "Plan", "Site", "SparseExpert"]
