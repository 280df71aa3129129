"""LoRA-IR (Ai et al., arXiv 2410.15385), for text: LoRAs behind one gate, which learns the tasks first."""

from modular_experts.systems.lora_ir.plan import LoRAIR

__all__ = ["LoRAIR"]
