"""PEFT: adapters of the library `peft`, read and written by their file format; that library is not needed."""

from modular_experts.interop.peft.form import Carried, PeftForm
from modular_experts.interop.peft.lora_form import LoraForm
from modular_experts.interop.peft.proof import AdapterCheck
from modular_experts.interop.peft.reading import read_peft
from modular_experts.interop.peft.sparse_forms import ShiraForm, SupertuningForm
from modular_experts.interop.peft.writing import WrittenAdapter, write_peft

__all__ = [
    "AdapterCheck",
    "Carried",
    "LoraForm",
    "PeftForm",
    "ShiraForm",
    "SupertuningForm",
    "WrittenAdapter",
    "read_peft",
    "write_peft",
]
