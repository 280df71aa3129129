"""Quantise a base while it is loaded, and read the quantised weights of its layers.

bitsandbytes has 4 and 8 bits, torchao weight-only forms; transformers puts both into a model. The files, the
fingerprint and the deltas of experts belong to the base that is not quantised.
"""

import copy
import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from modular_experts.library.record import Record
from modular_experts.native.transient import TransientWeight

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

Quantise = Literal["nf4", "fp4", "int8", "int8-torchao", "float8-torchao", "intx-torchao"]
"""Forms: 4-bit floats and 8-bit integers of bitsandbytes, and weight-only forms of torchao."""
_TORCHAO = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig", "intx": "IntxWeightOnlyConfig"}


def quantiser(form: str, dtype: torch.dtype) -> "BitsAndBytesConfig | TorchAoConfig":
    """Return the settings of a form for transformers' `from_pretrained`."""
    if form not in get_args(Quantise):
        dynamic = "dynamic" in form or "da" in form.split("-")
        reason = "it also rounds the activations, and has no gradient; " if dynamic else ""
        raise ValueError(f"quantise={form!r} is not supported: {reason}take one of {', '.join(get_args(Quantise))}")
    if dtype == torch.float64:
        raise ValueError(f"quantise={form!r} does not compute in float64; set dtype to float32 or bfloat16")
    library = "torchao" if form.endswith("-torchao") else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"quantise={form!r} needs {library}: pip install 'modular-experts[quantised]'")
    # They name kernels of a GPU that they do not find, and each layer that casts its inputs.
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if library == "torchao":
        import torchao.quantization

        return TorchAoConfig(getattr(torchao.quantization, _TORCHAO[form.partition("-")[0]])())
    if form == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=form, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def quantisation_facts(form: str, dtype: torch.dtype) -> Record:
    """Return the library, its version and its settings, for the record of an expert."""
    from importlib.metadata import version

    library = "torchao" if form.endswith("-torchao") else "bitsandbytes"
    return {"form": form, "library": f"{library} {version(library)}", "settings": quantiser(form, dtype).to_diff_dict()}


def quantised_shapes(
    model: "PreTrainedModel", settings: "QuantizationConfigMixin | Record", dtype: torch.dtype
) -> None:
    """Give a model on the meta device the layers of bitsandbytes that it has when transformers quantises it.

    `settings` come from `quantiser`, or are the `quantization_config` of its files; all else has the dtype.
    """
    from transformers.quantizers import AutoHfQuantizer

    quantises = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    with torch.device("meta"):
        quantises.preprocess_model(model=model, device_map={"": "cpu"}, dtype=dtype)


def packed(weight: Any, dtype: torch.dtype) -> nn.Parameter:
    """Return what becomes of a weight that `quantised_shapes` left as it is, with shapes and no numbers in mind."""
    import bitsandbytes.functional as bnb

    if not hasattr(weight, "quant_type"):
        made: Any = nn.Parameter(torch.empty(weight.shape, dtype=torch.int8), requires_grad=False)
        made.CB = made.data
        made.SCB = torch.empty(len(weight))
        return made
    blocks = -(-weight.numel() // weight.blocksize)
    state = {name: getattr(weight, name) for name in ("shape", "blocksize", "quant_type")}
    state |= {"dtype": dtype, "code": torch.empty(16), "absmax": torch.empty(blocks)}
    if weight.compress_statistics:
        outer = bnb.QuantState(
            torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
        )
        state |= {"absmax": torch.empty(blocks, dtype=torch.uint8), "offset": torch.empty(()), "state2": outer}
    made = nn.Parameter(torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
    made.quant_state = bnb.QuantState(**state)
    return made


def is_quantised(layer: nn.Module) -> bool:
    """Return whether the weight of a linear layer can be dequantised."""
    return isinstance(layer, nn.Linear) and _reader(layer) is not None


def read_weight(layer: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight of a linear layer `(out, in)`: its own, or one that is dequantised whenever it is read."""
    if not isinstance(layer, nn.Linear) or (reader := _reader(layer)) is None:
        return layer.weight
    read, own = reader
    return TransientWeight.of(read, (layer.out_features, layer.in_features), dtype or own, layer.weight.device)


def hold_rows(layer: Any) -> bool:
    """Let a layer hold its codes and scales as plain parameters, with a row of both for each output.

    FSDP2 parts plain parameters by rows, so that processes can share them; the numbers stay the same. It returns False
    and changes nothing where a block of 4-bit numbers with one scale goes on in the next row, and for torchao.
    """
    weight = layer.weight
    rows = layer.out_features
    state = _state(layer)
    if state is not None and layer.in_features % state.blocksize == 0:
        scales = state.absmax
        state.absmax = state.absmax.new_empty(0)
    elif hasattr(weight, "SCB"):
        scales = _scales(layer)
    else:
        return False
    layer.weight = nn.Parameter(weight.data.view(rows, -1), requires_grad=False)
    layer.row_scales = nn.Parameter(scales.view(rows, -1), requires_grad=False)
    layer.quant_state = state
    return True


def _from_rows(layer: Any) -> Tensor:
    import bitsandbytes.functional as bnb
    from torch.distributed.tensor import DTensor

    held = layer.weight, layer.row_scales
    codes, scales = (part.full_tensor() if isinstance(part, DTensor) else part for part in held)
    if layer.quant_state is None:
        return bnb.int8_vectorwise_dequant(codes, scales.view(-1))
    layer.quant_state.to(codes.device)
    state = copy.copy(layer.quant_state)
    state.absmax = scales.view(-1)
    return bnb.dequantize_4bit(codes.view(-1, 1), state)


def keep_order(model: nn.Module) -> None:
    """Let 4-bit layers keep their weight as it is; on some CPUs one that computes without gradients would repack it.

    The repacked form rounds the scales of the blocks, so that a base would change when it is measured.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _reader(layer: Any) -> tuple[Callable[[], Tensor], torch.dtype] | None:
    """Return what dequantises a layer's weight, and the dtype that it had before, or None for a plain weight."""
    weight = layer.weight
    state = _state(layer)
    if hasattr(layer, "row_scales"):
        return lambda: _from_rows(layer), torch.float32 if state is None else state.dtype
    if state is not None:
        import bitsandbytes.functional as bnb

        if getattr(state, "packing_format_for_cpu", False):
            state = _undo_packing(weight, state)
        return lambda: bnb.dequantize_4bit(weight.data, state), state.dtype
    if hasattr(weight, "SCB"):
        scales = _scales(layer)
        import bitsandbytes.functional as bnb

        return lambda: bnb.int8_vectorwise_dequant(weight.data, scales), torch.float32
    if isinstance(weight, Tensor) and type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "qdata"):
        return lambda: weight.dequantize(), weight.dtype
    return None


def _undo_packing(weight: Any, state: Any) -> Any:
    """Give a 4-bit weight back its usual order, and return its state.

    A layer that computes on a CPU without gradients keeps its weight in an order that only it reads. The function that
    undoes this is private in bitsandbytes 0.50.2.
    """
    import bitsandbytes.functional as bnb

    weight.data, weight.quant_state = bnb._convert_weight_packed_for_cpu_inverse(weight.data, state)
    return weight.quant_state


def _scales(layer: Any) -> Tensor:
    # `layer.state` takes the scales of 8 bits over at the first forward pass.
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB


def _state(layer: Any) -> Any:
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
