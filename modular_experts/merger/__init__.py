"""Merge stored experts, one weight after another. `merged.py` walks over the weights; open it first.

`estimate.py` predicts memory, `interference.py` measures how far experts contradict each other before they are
merged, and `remove.py` takes one expert out of an average again.
"""

from modular_experts.merger.merged import Merged, merge, write_merged

__all__ = ["Merged", "merge", "write_merged"]
