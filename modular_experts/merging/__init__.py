"""Merge stored experts, choose how on rows, put experts behind a router, and store them in fewer bytes.

Each file holds what Python calls by a command's name. `merged.py` walks over the weights of a merge; open it first.
`interference.py`, `estimate.py` and `remove.py` read experts alone. `tune.py` and `search.py` choose on validation
rows, by the losses of `objective.py`; `adapt.py` and `distill.py` train, too; `shrink.py`, `route.py` and `combine.py`
load models.
"""

from modular_experts.merging.merged import Merged, merge, write_merged

__all__ = ["Merged", "merge", "write_merged"]
