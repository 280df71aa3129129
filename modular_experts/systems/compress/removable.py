"""Know which parts of a model can be removed: transformer blocks, groups of attention heads, channels of MLPs.

A group is a key-value head with the query heads that read it. Because a configuration has one number for the heads and
one for the MLPs' width, every block keeps equally many groups and channels, but each block its own.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from modular_experts.base.files import quiet_transformers
from modular_experts.base.structure import Structure, is_transposed
from modular_experts.language_model import language_model, reads_prompts_apart
from modular_experts.text import block_of

Kind = Literal["groups", "channels"]

# The layers that make an MLP's channels, how many stretches of that width each makes, and the layer that reads them.
_MLPS = (
    ({"gate_proj": 1, "up_proj": 1}, "down_proj"),
    ({"gate_up_proj": 2}, "down_proj"),
    ({"c_fc": 1}, "c_proj"),
    ({"dense_h_to_4h": 1}, "dense_4h_to_h"),
)
# The layers that make queries, keys and values, in this order.
_ATTENTIONS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))


@dataclass(frozen=True)
class Kept:
    """The numbers of the parts of a model that stay, in order: blocks, and by block groups and MLP channels."""

    blocks: tuple[int, ...]
    groups: Mapping[int, Tensor]
    channels: Mapping[int, Tensor]


class Part(NamedTuple):
    """How a weight of a block holds groups or channels: along a dimension, in stretches, because one layer may make
    queries, keys and values; `units` tells for each stretch how many entries a group or channel takes there.
    """

    kind: Kind
    dim: int
    units: tuple[int, ...]


class Removable:
    """The parts of a causal language model that can be removed; errors call the model by its `place`.

    It has 1 group if its heads cannot be removed. `readers` are the layers that read `channels` and `groups`.
    """

    def __init__(self, model: PreTrainedModel, place: str) -> None:
        self.model = model
        self.place = place
        if language_model(model) is not None or reads_prompts_apart(model):
            raise ValueError(f"{place} is more than a causal language model, and compress makes no other model smaller")
        structure = Structure(model)
        self.parameters = sum(structure.shapes[name].numel() for name in structure.weights)
        blocks = [block for block in map(block_of, structure.weights) if block]
        self._container = blocks[0].rpartition(".")[0] if blocks else ""
        self.blocks = int(model.config.num_hidden_layers)
        inside: list[dict[str, torch.Size]] = [
            {name: weight.shape for name, weight in block.named_parameters()} for block in self.modules(model)
        ]
        if len(inside) != self.blocks or any(shapes != inside[0] for shapes in inside):
            raise ValueError(f"the transformer blocks of {place} differ in their weights, so none can be removed")
        self.readers: dict[Kind, str] = {}
        self.parts: dict[str, Part] = {}
        self._heads()
        self._channels()
        # Parameters outside of the blocks, of a block without groups and channels, of a group and of a channel.
        prices = {"groups": 0, "channels": 0}
        for name, part in self.parts.items():
            shape = inside[0][name]
            prices[part.kind] += shape.numel() // shape[part.dim] * sum(part.units)
        whole = sum(shape.numel() for shape in inside[0].values())
        self._outside = self.parameters - self.blocks * whole
        self._group = prices["groups"]
        self._channel = prices["channels"]
        self._rest = whole - self.groups * self._group - self.channels * self._channel

    def modules(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the transformer blocks of this model, or of one that was cut from it."""
        return list(model.get_submodule(self._container).children()) if self._container else []

    def makers(self, kind: Kind) -> list[str]:
        """Return the names within a block of the layers that make its groups or channels, all of the same inputs."""
        names = [name.removesuffix(".weight") for name, part in self.parts.items() if part.kind == kind]
        return [name for name in names if name != self.readers[kind] and not name.endswith(".bias")]

    def count(self, blocks: int, groups: int, channels: int) -> int:
        return self._outside + blocks * (self._rest + groups * self._group + channels * self._channel)

    def widest(self, blocks: int, groups: int, limit: int, multiple: int = 1) -> int:
        """Return the most channels within a limit of parameters, a multiple of `multiple` unless all stay, or 0."""
        room = (limit - self.count(blocks, groups, 0)) // (blocks * self._channel)
        return self.channels if room >= self.channels else max(0, room // multiple * multiple)

    def indices(self, part: Part, kept: Kept, block: int) -> Tensor:
        """Return where the entries that stay lie along the dimension of a part."""
        members = getattr(kept, part.kind)[block]
        count = getattr(self, part.kind)
        stretches = []
        start = 0
        for unit in part.units:
            stretches.append(start + (members[:, None] * unit + torch.arange(unit)).flatten())
            start += count * unit
        return torch.cat(stretches)

    @torch.no_grad()
    def cut(self, kept: Kept) -> PreTrainedModel:
        """Return a smaller model of the kept parts; it shares weights that stay whole with the model."""
        config = self._config(kept)
        with quiet_transformers(), Unfilled():
            small = AutoModelForCausalLM.from_config(
                config, dtype=self.model.dtype, attn_implementation=self.model.config._attn_implementation
            )
        wanted = small.state_dict()
        state = dict(self._weights(kept, self.model.state_dict()))
        for name, tensor in wanted.items():
            if name not in state or state[name].shape != tensor.shape:
                raise ValueError(
                    f"{self.place} cannot be made smaller: {type(small).__name__} needs {name} of shape "
                    f"{tuple(tensor.shape)}, which does not follow from the layers around it"
                )
        small.load_state_dict(state, assign=True)
        small.tie_weights()
        return small.eval()

    def _weights(self, kept: Kept, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the name in the smaller model and the value of each weight that stays."""
        start = f"{self._container}."
        for name, tensor in state.items():
            if not name.startswith(start):
                yield name, tensor
                continue
            number, _, local = name.removeprefix(start).partition(".")
            block = int(number)
            part = self.parts.get(local)
            if block not in kept.blocks:
                continue
            if part and len(getattr(kept, part.kind)[block]) < getattr(self, part.kind):
                tensor = tensor.index_select(part.dim, self.indices(part, kept, block).to(tensor.device))
            yield f"{start}{kept.blocks.index(block)}.{local}", tensor

    def _config(self, kept: Kept) -> Any:
        config: Any = copy.deepcopy(self.model.config)
        # Kinds of attention by block, and the like.
        for key, value in config.to_dict().items():
            if isinstance(value, list) and "layer" in key and len(value) == self.blocks:
                setattr(config, key, [value[block] for block in kept.blocks])
        config.num_hidden_layers = len(kept.blocks)
        first = kept.blocks[0]
        if len(kept.channels[first]) < self.channels:
            setattr(config, self._width_key, len(kept.channels[first]))
        groups = len(kept.groups[first])
        if groups < self.groups:
            config.head_dim = self._head
            config.num_attention_heads = config.num_attention_heads // self.groups * groups
            config.num_key_value_heads = groups
        return config

    def _heads(self) -> None:
        """Find the groups of heads, or one group of all if the configuration fixes their size."""
        config = self.model.config
        block = self.modules(self.model)[0]
        self.groups = 1
        self._head = 0
        heads = int(config.num_attention_heads)
        groups = getattr(config, "num_key_value_heads", None)
        for name, layer in block.named_modules():
            children = dict(layer.named_children())
            makers = next((names for names in _ATTENTIONS if {*names, "o_proj"} <= children.keys()), None)
            if makers and groups:
                self._head = getattr(config, "head_dim", None) or config.hidden_size // heads
                self.groups = int(groups)
                query = heads // int(groups) * self._head
                units = (query, self._head, self._head)
                own = [units] if len(makers) == 1 else [(unit,) for unit in units]
                for maker, its in zip(makers, own, strict=True):
                    self._add(f"{name}.{maker}", children[maker], "groups", its)
                self._add(f"{name}.o_proj", children["o_proj"], "groups", (query,), reads=True)
                return

    def _channels(self) -> None:
        config = self.model.config
        block = self.modules(self.model)[0]
        self._width_key = "n_inner" if hasattr(config, "n_inner") else "intermediate_size"
        for name, layer in block.named_modules():
            children = dict(layer.named_children())
            for makers, reader in _MLPS:
                if {*makers, reader} <= children.keys():
                    self.channels = oriented(children[reader]).shape[1]
                    for maker, times in makers.items():
                        self._add(f"{name}.{maker}", children[maker], "channels", tuple(1 for _ in range(times)))
                    self._add(f"{name}.{reader}", children[reader], "channels", (1,), reads=True)
                    return
        known = ", ".join("/".join([*makers, reader]) for makers, reader in _MLPS)
        raise ValueError(
            f"{self.place} is a {type(self.model).__name__}, and no known form ({known}) fits its MLPs, so it cannot "
            "be made smaller"
        )

    def _add(self, name: str, layer: nn.Module, kind: Kind, units: tuple[int, ...], reads: bool = False) -> None:
        """Note how a layer's weight, and the bias of one that makes parts, hold them."""
        transposed = is_transposed(layer)
        self.parts[f"{name}.weight"] = Part(kind, int(reads != transposed), units)
        if reads:
            self.readers[kind] = name
        elif layer.bias is not None:
            self.parts[f"{name}.bias"] = Part(kind, 0, units)


def oriented(layer: nn.Module) -> Tensor:
    """Return a view `(out, in)` of a linear layer's weight."""
    weight = layer.get_parameter("weight").data
    return weight.T if is_transposed(layer) else weight


class Unfilled(TorchFunctionMode):
    """Make layers without drawing their numbers."""

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        settings = kwargs or {}
        if function in (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_) and "tensor" in settings:
            return settings["tensor"]
        return function(*args, **settings)
