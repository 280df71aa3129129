"""Deltas: how far one weight moved from the base, as a value with exact arithmetic.

`forms.py` has the four forms and their sum; open it first. `tiles.py` numbers, reads and writes the tiles of a matrix,
`algebra.py` has inner products, `task_vector.py` all deltas of one expert by weight name. No module, file or training
is known here.
"""

from modular_experts.deltas.forms import BlockSparse, Delta, Dense, LowRank, Sparse, add, all_finite
from modular_experts.deltas.task_vector import Scaled, Sum, TaskVector

__all__ = ["BlockSparse", "Delta", "Dense", "LowRank", "Scaled", "Sparse", "Sum", "TaskVector", "add", "all_finite"]
