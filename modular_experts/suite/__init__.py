"""Generate 28 small text tasks from a seed, the suite, to try things in minutes without any data.

A task of your own is a `WordTask` of a few lines.
"""

from modular_experts.suite.tasks import HELD_IN, HELD_OUT, WordTask

__all__ = ["HELD_IN", "HELD_OUT", "WordTask"]
