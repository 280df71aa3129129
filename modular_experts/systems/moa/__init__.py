"""MoA (arXiv 2506.05928): adapters of several kinds behind one router of each transformer block."""

from modular_experts.systems.moa.plan import MoA

__all__ = ["MoA"]
