"""These public batteries check every expert type, every merge method and every router, built-in or yours."""

from modular_experts.testing.experts import check_expert
from modular_experts.testing.methods import check_merge_method
from modular_experts.testing.routers import check_router

__all__ = ["check_expert", "check_merge_method", "check_router"]
