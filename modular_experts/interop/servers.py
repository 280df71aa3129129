"""Write experts as LoRAs that vLLM, SGLang or llama.cpp load, by the rules of each, and say how to start the server.

The rules are those in the sources of vLLM 0.33, SGLang 0.5.23 and llama.cpp: no biases, no other saved modules, and one
rank for all weights of an adapter, which is `lora_alpha` too, so that no server scales.

An expert can also be sparse weight patches of vLLM: new values for the weights of a running base. vLLM's
`SparseWeightPatch` has a tensor's name in the checkpoint, its `full_shape`, flat `indices` in int32, and `values` in
the checkpoint's dtype. It defines no file for them; here they lie in one of safetensors, under `NAME/indices` and
`NAME/values`, with all shapes as JSON under `shapes` of its metadata.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modular_experts.base import Base
from modular_experts.base.files import MANIFEST, write_manifest
from modular_experts.base.structure import Structure, split_slice
from modular_experts.deltas import all_finite
from modular_experts.interop.peft.formats import LoraFormat, PeftFormat
from modular_experts.interop.peft.write import Encoded, WrittenAdapter, export
from modular_experts.language_model import is_classifier
from modular_experts.library import StoredExpert, as_parents, check_target, new_directory, open_experts
from modular_experts.native.sparse_passes import add_rounded, unequal
from modular_experts.progress import Progress

Server = Literal["vllm", "sglang", "llama.cpp"]

# The values of vLLM's --max-lora-rank. SGLang takes any rank, so that one folder serves both.
_STEPS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_RANKS: Mapping[str, Sequence[int]] = {"vllm": _STEPS, "sglang": _STEPS, "llama.cpp": range(1, 513)}
# SGLang joins the LoRAs of these layers, and fails on a block that lacks one of them.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
GGUF_FILE = "adapter.gguf"
PATCH_FILE = "patch.safetensors"
# transformers' name of an architecture -> llama.cpp's, whose converter turns rows only in q_proj and k_proj of `llama`.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
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
    opened = open_experts(experts, base=base)
    places = Path(out).expanduser().absolute()
    if len({expert.name for expert in opened}) < len(opened):
        raise ValueError("two of the experts have one name, and requests choose by the name; give each its own")
    opened_base = Base.open(base, opened)
    if is_classifier(opened_base.structure.model):
        raise ValueError(f"{opened_base.place} classifies by task heads, which no server takes; export it for PEFT")
    format = LoraFormat(steps=_RANKS[server], keep=keep)
    for expert in opened:
        _check(expert, opened_base.structure, server)
    written = {}
    for expert in opened:
        target = places / expert.name
        write = write_gguf if server == "llama.cpp" else None
        # vLLM and SGLang load the class that the checkpoint names, and ignore layers by other names without a word.
        wrapper = opened_base.wrapper is not None
        written[expert.name] = export(
            expert, target, format, None, opened_base, tolerance, overwrite, progress, write, wrapper
        )
    return ServedAdapters(written, _start(server, shlex.quote(opened_base.place), written, places))


def _start(server: Server, base: str, written: Mapping[str, WrittenAdapter], places: Path) -> str:
    paths = {name: shlex.quote(str(places / name)) for name in written}
    together = min(len(written), _IN_BATCH)
    named = " ".join(f"{name}={path}" for name, path in paths.items())
    if server == "vllm":
        limits = f"--max-loras {together} --max-lora-rank {max(adapter.rank for adapter in written.values())}"
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
                "checkpoint with `apply`"
            )
        *block, layer, _ = name.split(".")
        joined = [".".join([*block, other, "weight"]) for group in _JOINED if layer in group for other in group]
        missing = [other for other in joined if other in structure.shapes and other not in shapes]
        if server == "sglang" and missing:
            raise ValueError(f"{expert.name} moves {name} and not {missing[0]}, and SGLang joins their LoRAs")


def write_gguf(directory: Path, base: Base, format: PeftFormat, encoded: Encoded) -> None:
    """Write the factors of all weights, of the rank of a `LoraFormat`, in float32 into `GGUF_FILE` of a directory.

    It does so as llama.cpp's own `convert_lora_to_gguf.py`, and reads the file again.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError("llama.cpp's files need gguf: pip install 'modular-experts[gguf]'") from error
    assert isinstance(format, LoraFormat)
    assert format.rank is not None
    config: Any = base.structure.model.config
    architecture = _ARCHITECTURES.get(config.model_type, "")
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        raise ValueError(
            f"the names of {config.model_type} in GGUF files are not known here, only the names of "
            f"{', '.join(_ARCHITECTURES)}; export for vllm, and run llama.cpp's convert_lora_to_gguf.py on the folder"
        )
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = dict[str, Tensor]()
    turned = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in encoded.items():
        if (key := names.get_name(name, (".weight",))) is None:
            raise ValueError(f"{name} has no name in a GGUF file of {architecture}, so llama.cpp cannot move it")
        product: Any = weight.delta
        heads = turned.get(name.split(".")[-2]) if architecture == "llama" else None
        up = product.up if heads is None else interleaved(product.up, heads)
        tensors |= {f"{key}.lora_a": product.down.contiguous(), f"{key}.lora_b": up.contiguous()}
    writer = gguf.GGUFWriter(directory / GGUF_FILE, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(format.rank))  # llama.cpp scales by alpha / rank
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    stored = {
        field.name: torch.from_numpy(field.data.copy()) for field in gguf.GGUFReader(directory / GGUF_FILE).tensors
    }
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[key], tensors[key]) for key in tensors)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Return rows `(out, rank)` in llama.cpp's order: within each head, both halves interleaved.

    There rotary positions turn neighbouring rows, in transformers rows half a head apart.
    """
    return rows.view(heads, 2, rows.shape[0] // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


class WrittenPatch(NamedTuple):
    """How many tensors a patch changes, and how many values."""

    tensors: int
    changed: int


def export_patch(
    expert: str | Path | StoredExpert,
    out: str | Path,
    base: str | Path | Base | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
) -> WrittenPatch:
    """Write an expert or a merge as a patch: the base with it has the bits of the checkpoint that `apply` writes.

    The whole patch is in memory. The arguments are as for `export`.
    """
    target = check_target(out, overwrite, MANIFEST)
    (opened,) = open_experts([expert], base=base)
    opened_base = Base.open(base, [opened])
    opened_base.structure.check_fit(opened.shapes())
    if parts := [name for name in opened if name not in opened_base.structure.weights]:
        raise ValueError(f"{opened.name} moves {parts[0]}, a part of a stored tensor; write a checkpoint with apply")
    tensors = dict[str, Tensor]()
    shapes = dict[str, list[int]]()
    for name in progress(list(opened)):
        stored = opened_base.weights.read(name)
        total = add_rounded(stored, opened[name], stored.dtype).weight
        if not all_finite(total):
            raise ValueError(f"{name} plus its delta is not finite in {stored.dtype}; take a smaller scale")
        places = torch.from_numpy(unequal(total, stored)).view(-1).nonzero()[:, 0]
        if len(places) and places[-1] >= 2**31:
            raise ValueError(f"{name} has {total.numel()} entries, more than vLLM's indices in int32 can name")
        for key in opened_base.weights.keys(name) if len(places) else ():
            tensors |= {f"{key}/indices": places.to(torch.int32), f"{key}/values": total.view(-1)[places]}
            shapes[key] = list(stored.shape)
    with new_directory(target, overwrite, MANIFEST) as directory:
        save_file(tensors, directory / PATCH_FILE, metadata={"format": "pt", "shapes": json.dumps(shapes)})
        identity = {"id": opened_base.place, "revision": opened_base.revision, "fingerprint": opened_base.fingerprint}
        write_manifest(directory, {"base": identity, "experts": as_parents([opened])})
    return WrittenPatch(len(shapes), sum(tensor.numel() for tensor in tensors.values()) // 2)
