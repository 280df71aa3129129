"""Write experts as LoRAs that vLLM, SGLang or llama.cpp load, by the rules of each, and say how to start the server.

The rules are those in the sources of vLLM 0.33, SGLang 0.5.23 and llama.cpp: no biases, no other saved modules, and one
rank for all weights of an adapter, which is `lora_alpha` too, so that no server scales.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from torch import nn

from modular_experts.base import Base
from modular_experts.base.structure import Structure, split_slice
from modular_experts.interop.gguf_lora import GGUF_FILE, write_gguf
from modular_experts.interop.peft.formats import LoraFormat
from modular_experts.interop.peft.write import WrittenAdapter, export
from modular_experts.library import StoredExpert, open_experts
from modular_experts.progress import Progress

Server = Literal["vllm", "sglang", "llama.cpp"]

# The values of vLLM's --max-lora-rank. SGLang takes any rank, so that one folder serves both.
_STEPS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_RANKS: Mapping[str, Sequence[int]] = {"vllm": _STEPS, "sglang": _STEPS, "llama.cpp": range(1, 513)}
# SGLang joins the LoRAs of these layers, and fails on a block that lacks one of them.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_IN_BATCH = 8  # the most adapters of a batch in the start line: SGLang's default, while vLLM's is one


class ServedAdapters(NamedTuple):
    """The adapter of each expert by its name, the `model` of requests, and the command that starts the server."""

    adapters: Mapping[str, WrittenAdapter]
    start: str


def export_for(
    experts: Sequence[str | Path | StoredExpert],
    out: str | Path,
    server: Server,
    keep: float = 0.7,
    base: str | Path | Base | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    progress: Progress = iter,
) -> ServedAdapters:
    """Write each expert as a LoRA for a server, into a folder of its name in `out`.

    Low-rank experts are written exactly, filled up with zeros to a rank that the server takes; any other expert at the
    smallest such rank that keeps the share `keep` of its squared Frobenius norm. The rest is as for `export`.
    """
    opened, places = open_experts(experts, base=base), Path(out).expanduser().absolute()
    if len({expert.name for expert in opened}) < len(opened):
        raise ValueError("two of the experts have one name, and requests choose by the name; give each its own")
    found, format = Base.open(base, opened), LoraFormat(steps=_RANKS[server], keep=keep)
    for expert in opened:
        _check(expert, found.structure, server)
    written = {}
    for expert in opened:
        target, write = places / expert.name, write_gguf if server == "llama.cpp" else None
        written[expert.name] = export(expert, target, format, None, found, tolerance, overwrite, progress, write)
    return ServedAdapters(written, _start(server, shlex.quote(found.place), written, places))


def _start(server: Server, base: str, written: Mapping[str, WrittenAdapter], places: Path) -> str:
    paths, together = {name: shlex.quote(str(places / name)) for name in written}, min(len(written), _IN_BATCH)
    named = " ".join(f"{name}={path}" for name, path in paths.items())
    if server == "vllm":
        limits = f"--max-loras {together} --max-lora-rank {max(one.rank for one in written.values())}"
        return f"vllm serve {base} --enable-lora {limits} --lora-modules {named}"
    if server == "sglang":
        limits = f"--enable-lora --max-loras-per-batch {together}"
        return f"python -m sglang.launch_server --model-path {base} {limits} --lora-paths {named}"
    files = " ".join(f"--lora {path}/{GGUF_FILE}" for path in paths.values())
    return f"llama-server --model BASE.gguf --lora-init-without-apply {files}"


def _check(expert: StoredExpert, structure: Structure, server: Server) -> None:
    shapes = {name: shape for name, shape in expert.shapes().items() if not expert[name].is_empty}
    structure.check_fit(shapes, expert.name)
    for name in shapes:
        plain = split_slice(name)[1] is None and isinstance(structure.layer(name), nn.Linear)
        if not (plain and name.endswith(".weight")):
            raise ValueError(
                f"{expert.name} moves {name}, and {server} takes LoRAs of the weights of linear layers alone; write a "
                "checkpoint with modular-experts apply"
            )
        *block, layer, _ = name.split(".")
        joined = [".".join([*block, other, "weight"]) for group in _JOINED if layer in group for other in group]
        missing = [other for other in joined if other in structure.shapes and other not in shapes]
        if server == "sglang" and missing:
            raise ValueError(f"{expert.name} moves {name} and not {missing[0]}, and SGLang joins their LoRAs")
