"""GLoRA (Chavan et al., arXiv 2306.07967): a change of weight and bias in five parts, of which a layer keeps some.

`expert.py` has the parts, `callback.py` trains all paths at once, `search.py` chooses one for each layer, and `peft.py`
writes PEFT's adapter.
"""

from modular_experts.systems.glora.expert import GLoRAExpert

__all__ = ["GLoRAExpert"]
