"""HiLo (arXiv 2502.03884): mixtures of LoRAs whose numbers of experts and ranks depend on the depth."""

from modular_experts.systems.hilo.plan import HiLo

__all__ = ["HiLo"]
