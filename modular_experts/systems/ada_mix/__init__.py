"""AdaMix (Wang et al., arXiv 2205.12410): copies of a LoRA's half, one drawn for each step, averaged in the end.

`expert.py` holds the copies, and compares the predictions of two draws.
"""

from modular_experts.systems.ada_mix.expert import AdaMixExpert

__all__ = ["AdaMixExpert"]
