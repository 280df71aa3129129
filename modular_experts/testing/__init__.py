"""These public batteries check every expert type, plan, merge method, router and callback, built-in or yours."""

from modular_experts.testing.callbacks import check_callback
from modular_experts.testing.experts import check_expert, check_plan
from modular_experts.testing.methods import check_merge_method
from modular_experts.testing.routers import check_router

__all__ = ["check_callback", "check_expert", "check_merge_method", "check_plan", "check_router"]
