"""RECAST (Tasnim and Plummer, arXiv 2411.16870): a task trains how much each layer takes of shared templates."""

from modular_experts.systems.recast.plan import RecastExpert, TemplateBanks

__all__ = ["RecastExpert", "TemplateBanks"]
