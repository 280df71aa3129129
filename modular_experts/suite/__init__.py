"""The generated suite: 28 small text tasks made from a seed, for trying things in minutes without any data."""

from modular_experts.suite.tasks import HELD_IN, HELD_OUT
from modular_experts.suite.words import WordTask

__all__ = ["HELD_IN", "HELD_OUT", "WordTask"]
