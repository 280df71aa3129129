"""Find, read and write pretrained models on disk, the bases of experts, and add experts to them.

`base.py` is the face: `Base.open(place)` finds, fetches and checks a checkpoint; it loads the model and its tokenizer,
reads one weight, and writes the base plus deltas as a new checkpoint. `apply.py` opens experts by `library/`, and adds
them on disk and in memory.
This room trains nothing and merges nothing. Open `base.py` first.
"""

from modular_experts.base.base import Base, DType, Origin

__all__ = ["Base", "DType", "Origin"]
