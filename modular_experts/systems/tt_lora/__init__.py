"""TT-LoRA (Anjum et al., arXiv 2408.01008): a delta that is a chain of small cores."""

from modular_experts.systems.tt_lora.expert import TTLoRAExpert

__all__ = ["TTLoRAExpert"]
