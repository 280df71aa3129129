"""PEFT: adapters of the library `peft`, read and written by their file format; that library is not needed."""

from modular_experts.interop.peft.formats import Carried, LoraForm, PeftForm, ShiraForm, SupertuningForm
from modular_experts.interop.peft.read import read_peft
from modular_experts.interop.peft.verify import AdapterCheck
from modular_experts.interop.peft.write import WrittenAdapter, export, write_peft

__all__ = [
    "AdapterCheck",
    "Carried",
    "LoraForm",
    "PeftForm",
    "ShiraForm",
    "SupertuningForm",
    "WrittenAdapter",
    "export",
    "read_peft",
    "write_peft",
]
