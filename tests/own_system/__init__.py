"""A system as somebody writes it outside of the package: an expert, a plan, a router, a schedule and a PEFT format."""

from own_system.expert import GatedRay, RayExpert, Rays
from own_system.peft import RayFormat
from own_system.router import Largest, Nearest
from own_system.schedule import Pauses

__all__ = ["GatedRay", "Largest", "Nearest", "Pauses", "RayExpert", "RayFormat", "Rays"]
