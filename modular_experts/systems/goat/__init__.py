"""GOAT (Fan et al., arXiv 2502.16894): a mixture of LoRAs that starts in segments of the base weight's spectrum."""

from modular_experts.systems.goat.expert import GOATExpert

__all__ = ["GOATExpert"]
