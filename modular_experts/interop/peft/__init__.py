"""Read and write adapters of the library `peft` by their file format; that library need not be installed.

`read.py` (open it first) reads with `files.py` and `terms.py`, what a module's tensors do to its weight.
`write.py` writes with `formats.py`, the kinds of adapter, and `verify.py`, which loads the result again.
"""

from modular_experts.interop.peft.formats import (
    EncodedWeight,
    LoraFormat,
    PeftFormat,
    ShiraFormat,
    SupertuningFormat,
)
from modular_experts.interop.peft.read import read_peft
from modular_experts.interop.peft.verify import AdapterCheck
from modular_experts.interop.peft.write import WrittenAdapter, export, write_peft

__all__ = [
    "AdapterCheck",
    "EncodedWeight",
    "LoraFormat",
    "PeftFormat",
    "ShiraFormat",
    "SupertuningFormat",
    "WrittenAdapter",
    "export",
    "read_peft",
    "write_peft",
]
