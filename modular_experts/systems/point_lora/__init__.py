"""PointLoRA (arXiv 2504.16023), for text: LoRAs, shared MLPs, and selected tokens of the prompt in front of it."""

from modular_experts.systems.point_lora.plan import PointLoRA

__all__ = ["PointLoRA"]
