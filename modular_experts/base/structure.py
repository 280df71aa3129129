"""Describe a model's weights and layers, and read its stored weights one at a time, by the names in the model."""

import re
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.base.quantised import is_quantised, read_weight
from modular_experts.deltas import all_finite
from modular_experts.library.tensorfile import DTYPES, MappedTensors
from modular_experts.native.transient import unset_fake_temporarily
from modular_experts.text import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightRenaming

_UNUSED = (r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)attn\.(masked_)?bias$", r"(^|\.)attention\.(masked_)?bias$")


class Structure:
    """What a model is made of, without its numbers.

    Attributes:
        model: The model, on any device; a causal language model for `vocabulary`, `name_of` and `is_unused`.
        place: What an error's sentence calls it; the name of its class if not given.
    """

    def __init__(self, model: nn.Module, place: str | None = None) -> None:
        self.model = cast("PreTrainedModel", model)
        self.place = place or type(model).__name__

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each weight by each of its names; a tied tensor has several names.

        The matrices of a parameter `(experts, ., .)` are weights too, such as `mlp.experts.down_proj[3]`.
        """
        shapes = {name: weight.shape for name, weight in self._parameters.items()}
        for name, module in self.model.named_modules():
            for key in sliced(module):
                whole = module._parameters[key]
                shapes |= {f"{name}.{key}[{number}]": whole.shape[1:] for number in range(len(whole))}
            if is_quantised(module):
                shape = (module.out_features, module.in_features)
                shapes[f"{name}.weight"] = torch.Size(shape[::-1] if is_transposed(module) else shape)
        return shapes

    @cached_property
    def owners(self) -> dict[str, str]:
        """For each name the first name of its tensor, under which a delta of it is stored."""
        first: dict[int, str] = {}
        owners = {name: first.setdefault(id(weight), name) for name, weight in self._parameters.items()}
        return {name: owners.get(name, name) for name in self.shapes}

    @cached_property
    def weights(self) -> list[str]:
        """First names of the parameters, which hold all weights, sorted."""
        return sorted({self.owners[name] for name in self._parameters})

    def twins(self, name: str) -> list[str]:
        """Return all names of a weight's tensor: more than one if it is tied."""
        return [other for other, owner in self.owners.items() if owner == self.owners[name]]

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """First names of the weights with a row for each token: embeddings, the head and its bias."""
        layers = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        theirs = {id(weight) for layer in layers if layer is not None for weight in layer.parameters()}
        return frozenset(self.owners[name] for name, weight in self._parameters.items() if id(weight) in theirs)

    def layer(self, weight: str) -> nn.Module:
        return self.model.get_submodule(weight.rpartition(".")[0])

    def name_of(self, key: str) -> str | None:
        """Return the model's name of a stored tensor, or None, as for one that transformers cuts or joins."""
        if key in self._parameters:
            return key
        from transformers.core_model_loading import rename_source_key

        name, _ = rename_source_key(key, self._renamings, [], self.model.base_model_prefix, self._parameters)
        return name if name in self._parameters else None

    @cached_property
    def _renamings(self) -> "list[WeightRenaming]":
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        return [way for way in get_model_conversion_mapping(self.model) if isinstance(way, WeightRenaming)]

    def is_unused(self, key: str) -> bool:
        """Return whether files may hold this tensor although the model ignores it, such as a mask of older versions."""
        patterns = (*_UNUSED, *(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()))
        return any(re.search(pattern, key) for pattern in patterns)

    def check(self, name: str, shape: torch.Size, source: str = "the expert") -> None:
        """Raise ValueError, which names the source, if the model lacks a weight or has it in another shape."""
        if name not in self.shapes:
            raise ValueError(
                f"{source} moves {name}, and {self.place} has no such weight{did_you_mean(name, self.shapes)}"
            )
        if self.shapes[name] != shape:
            raise ValueError(
                f"{source} moves {name} as a weight of shape {tuple(shape)}, and in {self.place} it has "
                f"{tuple(self.shapes[name])}; is it the right base?"
            )

    def check_untied(self, name: str, source: str) -> None:
        """Refuse an adapter's delta of one of several names of a tensor, as the adapter moves one of them alone."""
        if len(twins := self.twins(name)) > 1:
            raise ValueError(
                f"{source} moves one of {' and '.join(twins)} alone, and in {self.place} they are one tensor (tied); "
                f"make an untied copy, in Python Base.open({self.place!r}).untie('untied'), and give it as the base"
            )

    def check_fit(self, shapes: Mapping[str, torch.Size], source: str = "the expert") -> None:
        """Refuse deltas that cannot be added: `check` for each, and each under the first name of its tensor."""
        for name, shape in shapes.items():
            self.check(name, shape, source)
            owner = self.owners[name]
            if owner != name:
                raise ValueError(
                    f"{name} is the same tensor as {owner} (tied), so it has no delta of its own; leave it out of the "
                    f"expert's modules, store the delta under {owner}, which moves both, or train on a base whose "
                    "embeddings are untied"
                )


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is an `nn.Linear`, or of a subclass that computes the same, as Falcon's layers do."""
    return isinstance(module, nn.Linear) and _computes_linear(type(module).forward)


@cache
def _computes_linear(forward: Callable[[nn.Linear, Tensor], Tensor]) -> bool:
    if forward is nn.Linear.forward:
        return True
    # Let the forward pass multiply small whole numbers, with nothing at hand but a weight and a bias.
    try:
        with unset_fake_temporarily():
            numbers = torch.arange(11.0, device="cpu")
            weight = numbers[:6].view(3, 2)
            bias = numbers[6:9]
            x = numbers[None, 9:]
            layer = cast(nn.Linear, SimpleNamespace(weight=weight, bias=bias))
            return torch.equal(forward(layer, x), F.linear(x, weight, bias))
    except Exception:  # whatever a forward pass raises that needs more
        return False


def sliced(module: nn.Module) -> list[str]:
    """Return the parameters of a module that hold a matrix for each of its experts, `(experts, ., .)`.

    The module is one whose forward pass transformers lets take one matrix after the other.
    """
    takes_one = hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__")
    return [
        name
        for name, parameter in module._parameters.items()
        if takes_one and parameter is not None and parameter.dim() == 3
    ]


def split_slice(name: str) -> tuple[str, int | None]:
    """Return the parameter that a weight lies in, and its number there, or None for a parameter of its own."""
    match = re.fullmatch(r"(.*)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Return a weight of a model by its name: a parameter, or a view of a slice; raise AttributeError if absent."""
    whole, number = split_slice(name)
    place, _, key = whole.rpartition(".")
    if number is None:
        return model.get_parameter(name)
    # An expert's layer stands for the parameter while a slice has an expert.
    matrices = model.get_submodule(place)._parameters[key]
    assert matrices is not None
    return matrices.detach()[number]


def is_transposed(module: nn.Module) -> bool:
    """Return whether a base stores the module's weight as `(in, out)`, as it does for GPT-2's `Conv1D`.

    In memory a quantised weight is `(out, in)`.
    """
    source = getattr(module, "source_cls", type(module))
    return source.__name__ == "Conv1D" and (source is not type(module) or hasattr(module, "nf"))


def why_not_read(layer: nn.Module) -> str:
    """Return why the weight of a quantised layer cannot be read, as the end of a sentence, or an empty text."""
    weight = getattr(layer, "weight", None)
    if getattr(weight, "act_quant_kwargs", None) is not None or "Activation" in type(weight).__name__:
        return "whose quantised form also rounds the activations, which has no gradient; take a weight-only form"
    if is_quantised(layer):
        return ""
    is_other = isinstance(layer, nn.Linear) and not is_linear(layer)
    if is_other or (isinstance(weight, Tensor) and not weight.is_floating_point()):
        return "whose weight is quantised in a form that is not known; take nf4 or int8, or load the base as floats"
    return ""


def is_rounded(layer: nn.Module, stored: Tensor, step: int = 1) -> bool | None:
    """Return whether a quantised layer holds every `step`-th row of a weight, as a base stores it, within the error
    of its form; None for a plain layer, and for a bias, which no form quantises.
    """
    if not is_quantised(layer) or stored.ndim < 2:
        return None
    held = read_weight(layer, torch.float32).read()  # type: ignore[attr-defined]
    held = (held.T if is_transposed(layer) else held)[::step].cpu()
    # 4 bits have an error of a tenth, short rows more, and two different weights have one of about 1.4.
    return held.shape == stored.shape and bool((held - stored).norm() <= 0.9 * stored.float().norm())


class StoredWeights:
    """The weights of one checkpoint on disk; only the last one that was read is in memory."""

    def __init__(self, layouts: Mapping[Path, Mapping[str, tuple[str, torch.Size]]], structure: Structure) -> None:
        self.structure = structure
        self._files = {key: file for file, layout in layouts.items() for key in layout}
        self._layouts = {key: entry for layout in layouts.values() for key, entry in layout.items()}
        self._keys: dict[str, list[str]] = {name: [] for name in structure.weights}
        for key in self._files:
            name = structure.name_of(key)
            if name is not None:
                self._keys[structure.owners[name]].append(key)
        self._last: tuple[str, Tensor] | None = None
        self._open: tuple[Path, MappedTensors] | None = None
        place = structure.place
        missing = [name for name, keys in self._keys.items() if not keys]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            others = sorted(key for key in self.unclaimed() if not structure.is_unused(key))
            hint = f"; they hold {others[0]}, which is not one of its weights" if others else ""
            raise ValueError(
                f"the files of {place} do not hold {missing[0]}{more}, which its model ({structure.architecture}) "
                f"has{hint}; an import needs a tensor for each weight"
            )
        for name, keys in self._keys.items():
            for key in keys:
                dtype, shape = self._layouts[key]
                expected = structure.shapes[name]
                if dtype not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"{key} of {place} is stored as {dtype}: a quantised checkpoint has no exact difference from "
                        "its base; give the checkpoint from before it was quantised"
                    )
                if shape != expected:
                    raise ValueError(
                        f"{key} of {place} is stored in shape {tuple(shape)}, and by its config.json it has "
                        f"{tuple(expected)}; its files do not belong together"
                    )

    def keys(self, name: str) -> list[str]:
        """Return under which names the files hold a weight: several if it is tied and was stored more than once."""
        return self._keys[self.structure.owners[name]]

    def shape(self, name: str) -> torch.Size:
        return self._layouts[self.keys(name)[0]][1]

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._layouts[self.keys(name)[0]][0]]

    def unclaimed(self) -> set[str]:
        """Return the names of the stored tensors that are not weights of the model."""
        return self._files.keys() - {key for keys in self._keys.values() for key in keys}

    def read(self, name: str) -> Tensor:
        """Return one weight as stored: a view of the mapped file, never to be written to."""
        owner = self.structure.owners[name]
        place = self.structure.place
        if self._last and self._last[0] != owner:
            for key in self.keys(self._last[0]):
                self._mapped(key).release(key)
            self._last = None
        if not self._last:
            first, *others = self.keys(owner)
            tensor = self._mapped(first)[first]
            if not all_finite(tensor):
                raise ValueError(f"{first} of {place} holds numbers that are not finite (NaN or infinity)")
            for other in others:
                if not torch.equal(self._mapped(other)[other], tensor):
                    raise ValueError(
                        f"{first} and {other} are one tensor (tied) by the configuration of {place}, and its files "
                        "hold different values for them; correct tie_word_embeddings in its config.json"
                    )
            self._last = owner, tensor
        return self._last[1]

    def _mapped(self, key: str) -> MappedTensors:
        """Return the file of a tensor; one is open at a time, as a checkpoint may have more than a process may open."""
        if not self._open or self._open[0] != self._files[key]:
            self._open = self._files[key], MappedTensors(self._files[key])
        return self._open[1]
