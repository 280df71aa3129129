"""A delta states how far one weight moved from the base, as a value with exact arithmetic.

Open `forms.py` first: the four forms and their sum. `tiles.py` numbers, reads and writes the tiles of a matrix,
`algebra.py` has inner products and the nearest delta of a rank, `task_vector.py` all deltas of one expert by weight
name. This room knows tensors, and no file or training.
"""

from modular_experts.deltas.forms import BlockSparse, Delta, Dense, LowRank, Sparse, add, all_finite
from modular_experts.deltas.task_vector import Scaled, Sum, TaskVector

__all__ = ["BlockSparse", "Delta", "Dense", "LowRank", "Scaled", "Sparse", "Sum", "TaskVector", "add", "all_finite"]
