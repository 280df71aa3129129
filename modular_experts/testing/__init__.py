"""These public batteries check every expert type and every merge method, built-in or yours."""

from modular_experts.testing.experts import check_expert
from modular_experts.testing.methods import check_merge_method

__all__ = ["check_expert", "check_merge_method"]
