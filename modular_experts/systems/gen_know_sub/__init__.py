"""GenKnowSub (ACL 2025 short 54): Arrow among the experts without their mean."""

from modular_experts.systems.gen_know_sub.router import GenKnowSub

__all__ = ["GenKnowSub"]
