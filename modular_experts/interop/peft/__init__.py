"""PEFT: read and write adapters of the library `peft` by their file format; that library need not be installed.

Reading: `read.py` (open it first), `terms.py` (what the tensors of a module do to its weight), `files.py`. Writing:
`write.py`, `formats.py` (the kinds of adapter), `verify.py` (load the result again).
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
