"""Callbacks: ordinary Lightning citizens around `ExpertModule`, one idea per file."""

from modular_experts.callbacks.export_expert import ExportExpert
from modular_experts.callbacks.gradient_mask import GradientMask
from modular_experts.callbacks.mask_schedule import MaskSchedule
from modular_experts.callbacks.results import WritePredictions, WriteResults

__all__ = ["ExportExpert", "GradientMask", "MaskSchedule", "WritePredictions", "WriteResults"]
