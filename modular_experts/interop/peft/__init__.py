"""Read and write adapters of the library `peft`, the most common type without that library.

`read.py` (open it first) reads a plain LoRA from `files.py`; `asked.py` asks PEFT for the deltas of any other adapter.
`write.py` writes with `formats.py`, the kinds of adapter, and loads the result again.
"""

from modular_experts.interop.peft.asked import ask_peft
from modular_experts.interop.peft.formats import EncodedWeight, LoraFormat, PeftFormat, ShiraFormat, SupertuningFormat
from modular_experts.interop.peft.read import read_peft
from modular_experts.interop.peft.write import export

__all__ = ["EncodedWeight", "LoraFormat", "PeftFormat", "ShiraFormat", "SupertuningFormat", "ask_peft", "export"]
__all__ += ["read_peft"]
