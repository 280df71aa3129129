"""XGBLoRA (arXiv 2410.19694) and ReLoRA (arXiv 2307.05695): low-rank products, one after the other.

`expert.py` holds the sum, and the callback `Boosting` in `callback.py` begins a new product.
"""

from modular_experts.systems.boosting.expert import BoostedLoRAExpert

__all__ = ["BoostedLoRAExpert"]
