"""Expert types, one idea per file. Torch only: they train in any loop, with or without Lightning."""

from modular_experts.experts.expert import Expert
from modular_experts.experts.full import FullExpert
from modular_experts.experts.lora import LoRAExpert
from modular_experts.experts.masked import MaskedExpert
from modular_experts.experts.sparse import SparseExpert

__all__ = ["Expert", "FullExpert", "LoRAExpert", "MaskedExpert", "SparseExpert"]
