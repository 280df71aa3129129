"""Write a LoRA as a GGUF file, as llama.cpp's own `convert_lora_to_gguf.py` does, and read it again."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_experts.base import Base
from modular_experts.interop.peft.write import Encoded

GGUF_FILE = "adapter.gguf"
# transformers' name of an architecture -> llama.cpp's, whose converter turns rows only in q_proj and k_proj of `llama`.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def write_gguf(directory: Path, base: Base, format: Any, encoded: Encoded) -> None:
    """Write the factors of all weights, of the rank `format.rank`, in float32 into `GGUF_FILE` of a directory."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("llama.cpp's files need gguf: pip install 'modular-experts[gguf]'") from error
    config: Any = base.structure.model.config
    architecture = _ARCHITECTURES.get(config.model_type, "")
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        raise ValueError(
            f"the names of {config.model_type} in GGUF files are not known here, only the names of "
            f"{', '.join(_ARCHITECTURES)}; export for vllm, and run llama.cpp's convert_lora_to_gguf.py on the folder"
        )
    names, tensors = gguf.get_tensor_name_map(kind, config.num_hidden_layers), dict[str, Tensor]()
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
    stored = {one.name: torch.from_numpy(one.data.copy()) for one in gguf.GGUFReader(directory / GGUF_FILE).tensors}
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[key], tensors[key]) for key in tensors)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Return rows `(out, rank)` in llama.cpp's order: within each head, both halves interleaved.

    There rotary positions turn neighbouring rows, in transformers rows half a head apart.
    """
    return rows.view(heads, 2, rows.shape[0] // heads // 2, -1).transpose(1, 2).reshape(rows.shape)
