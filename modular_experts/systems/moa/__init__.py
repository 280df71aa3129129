"""Plan adapters of several kinds behind one router of each transformer block (MoA, arXiv 2506.05928)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.base.quantised import read_weight
from modular_experts.experts.expert import NotMergeable
from modular_experts.experts.lora import LoRAExpert
from modular_experts.experts.module_expert import ModuleExpert, refer
from modular_experts.experts.site import Factory, LayerPlan, Site, as_patterns, by_pattern
from modular_experts.text import block_of

BECAUSE = "its router chooses adapters by the input"
LAYERS = (
    "q_proj|k_proj|v_proj|qkv_proj|c_attn|query_key_value|o_proj|out_proj|attn.c_proj|attention.dense|self_attn.dense|"
    "down_proj|mlp.c_proj|dense_4h_to_h|fc2"
)
"""The queries, keys, values and outputs of attention, and the last layer of the MLP, by the names of architectures."""


@dataclass(eq=False)
class MoA(LayerPlan):
    """Adapters of several kinds behind one router of each transformer block, which weighs each adapter at each token.

    A LoRA at each of `modules`, and a bottleneck `up silu(down x)` beside the MLP. With h the block's input, the gates
    are `g = sigmoid(R h)`, one for each adapter. They do not sum to 1, and no loss balances them. In the soft form
    adapter t adds `g_t` times its output. In the sparse form, `threshold` above 0, it adds `g_t - G` times its output
    where `g_t >= G = threshold * sigmoid(w h + b)`, and is not computed for other tokens. All adapters start at zero,
    so training starts at the base.

    The released code weighs by `g_t` in the sparse form too, so that no gradient reaches G.

    Args:
        modules: Patterns of the layers that get a LoRA: queries, keys, values, outputs and the last layer of the MLP by
            default.
        rank: Rank of a LoRA.
        alpha: The scale of a LoRA is alpha / rank.
        adapter_size: Width of the bottleneck beside the module `mlp` of a block; 0 leaves it out.
        prompts: In the soft form, trained prompt vectors of each block, to which each token attends besides. 0 leaves
            them out; they need layers named q_proj, k_proj, v_proj and o_proj.
        router: R is one `linear` layer, or a `swiglu` network `W2 (silu(W1 h) * W3 h)`.
        router_width: With `swiglu`, hidden units for each adapter.
        router_input: h is the block's input after its first norm (`norm`), or as it is (`residual`).
        threshold: Largest G, from 0 (the soft form) to 1; the paper takes 0.5.
    """

    modules: str | Sequence[str] = LAYERS
    rank: int = 8
    alpha: float = 8.0
    adapter_size: int = 16
    prompts: int = 0
    router: Literal["linear", "swiglu"] = "linear"
    router_width: int = 4
    router_input: Literal["norm", "residual"] = "norm"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"MoA: threshold={self.threshold} is outside [0, 1]")
        if min(self.adapter_size, self.prompts) < 0 or self.router_width < 1:
            raise ValueError(
                f"MoA: adapter_size={self.adapter_size} and prompts={self.prompts} must be at least 0, and "
                f"router_width={self.router_width} at least 1"
            )
        if self.prompts and self.threshold:
            raise ValueError(
                f"MoA: prompts={self.prompts} are for the soft form, because attention sees whole rows; set prompts or "
                "threshold to 0"
            )
        if self.router not in ("linear", "swiglu") or self.router_input not in ("norm", "residual"):
            raise ValueError(
                f"MoA: router={self.router!r} must be linear or swiglu, and router_input={self.router_input!r} norm or "
                "residual"
            )
        self.modules = as_patterns(self.modules)

    def __call__(self, sites: Sequence[Site]) -> Mapping[Site | str, Factory]:
        chosen = by_pattern(dict.fromkeys(self.modules, LoRAExpert), "modules")(sites)
        blocks: dict[str, list[Site]] = {}
        for site in chosen:
            block = block_of(site.weight)
            if block is None:
                raise ValueError(f"MoA: {site.name} is in no transformer block, so no router is there; leave it out")
            blocks.setdefault(block, []).append(site)
        planned: dict[Site | str, Factory] = {}
        for block, inside in blocks.items():
            planned |= self._parts(block, inside)
        return planned

    def _parts(self, block: str, sites: Sequence[Site]) -> dict[Site | str, Factory]:
        """Plan the router of a block, which is made first, and its adapters, which refer to it."""
        count = len(sites) + (self.adapter_size > 0) + (self.prompts > 0)
        made: list[BlockGates] = []

        def gates(module: nn.Module) -> BlockGates:
            made.append(BlockGates(module, count, self))
            return made[0]

        def lora(weight: Tensor, number: int = 0) -> GatedLoRA:
            return GatedLoRA(weight, made[0], number, self.rank, self.alpha)

        planned: dict[Site | str, Factory] = {site: partial(lora, number=number) for number, site in enumerate(sites)}
        if self.adapter_size:
            planned[f"{block}.mlp"] = lambda module: ParallelAdapter(made[0], len(sites), self.adapter_size)
        if self.prompts:
            modules = {site.layer: site.name.rpartition(".")[0] for site in sites}
            if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= modules.keys():
                raise ValueError(
                    f"MoA: prompts={self.prompts} need layers q_proj, k_proj, v_proj and o_proj among `modules`, and "
                    f"{block} has {', '.join(modules)}; set prompts to 0"
                )
            planned[modules["o_proj"]] = lambda module: PromptAttention(module, made[0], self.prompts)
        return planned | {block: gates}


class BlockGates(ModuleExpert):
    """Shows the input of a block of some `adapters` to its router, and applies the gates to the adapters.

    The first child of the block with Norm in its class's name is its norm.
    """

    learning_rate: ClassVar[float] = 3e-3
    not_mergeable_because: ClassVar[str] = BECAUSE
    norm: nn.Module

    def __init__(self, block: nn.Module, adapters: int, plan: MoA) -> None:
        super().__init__()
        norm = next((child for child in block.children() if "norm" in type(child).__name__.lower()), None)
        if norm is None:
            raise ValueError(f"MoA: {type(block).__name__} has no norm of its input; MoA is for blocks with one")
        refer(self, norm=norm)
        weight = next(norm.parameters())
        self.size = weight.shape[-1]
        self.threshold = plan.threshold
        self.normed = plan.router_input == "norm"
        width = plan.router_width * adapters
        self.router: nn.Module = (
            nn.Linear(self.size, adapters) if plan.router == "linear" else SwiGLU(self.size, width, adapters)
        )
        self.limit = nn.Linear(self.size, 1) if plan.threshold else None
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        self._shares: Tensor | None = None

    def before(self, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.normed:
            hidden = self.norm(hidden)
        self._shares = self.shares(hidden.to(next(self.parameters()).dtype))

    def shares(self, hidden: Tensor) -> Tensor:
        """Return how much of each adapter each token takes, `(..., adapters)`; `hidden` `(..., size)` is h."""
        gates = torch.sigmoid(self.router(hidden))
        if self.limit is None:
            return gates
        least = self.threshold * torch.sigmoid(self.limit(hidden))
        return (gates - least).where(gates >= least, gates.new_zeros(()))

    def gated(self, number: int, x: Tensor, adapter: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what an adapter adds for inputs `(..., in)`; in the sparse form it sees the tokens that take it."""
        assert self._shares is not None
        share = self._shares[..., number, None]
        if self.limit is None:
            return share * adapter(x)
        flat = x.flatten(0, -2)
        share = share.flatten(0, -2)
        taken = share[:, 0].nonzero()[:, 0]
        # Where no token takes it, the product of no rows still gives its parameters a gradient, which DDP waits for.
        added = share[taken] * adapter(flat[taken])
        return added.new_zeros(len(flat), added.shape[-1]).index_copy(0, taken, added).view(*x.shape[:-1], -1)

    def __getstate__(self) -> dict[str, object]:
        # A copy begins without the gates of a pass.
        return vars(self) | {"_shares": None}


class SwiGLU(nn.Module):
    """`out (silu(gate x) * up x)`, without the biases of the released code, which start at zero."""

    def __init__(self, size: int, width: int, out: int) -> None:
        super().__init__()
        self.gate = nn.Linear(size, width, bias=False)
        self.up = nn.Linear(size, width, bias=False)
        self.out = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.up(x))


class GatedLoRA(NotMergeable, LoRAExpert):
    """Adds a LoRA's output, multiplied by its gate of the block; `number` is the adapter's number there."""

    not_mergeable_because: ClassVar[str] = BECAUSE
    gates: BlockGates

    def __init__(self, weight: Tensor, gates: BlockGates, number: int, rank: int = 8, alpha: float = 8.0) -> None:
        super().__init__(weight, rank, alpha)
        refer(self, gates=gates)
        self.number = number

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        base = F.linear(x, weight, bias)
        added = self.gates.gated(
            self.number, x.to(self.down.dtype), lambda h: F.linear(self.scale * F.linear(h, self.down), self.up)
        )
        return base + added.to(base.dtype)


class ParallelAdapter(ModuleExpert):
    """Adds a bottleneck with a SiLU to the output of an MLP, multiplied by its gate of the block."""

    learning_rate: ClassVar[float] = 3e-3
    not_mergeable_because: ClassVar[str] = BECAUSE
    gates: BlockGates

    def __init__(self, gates: BlockGates, number: int, width: int) -> None:
        super().__init__()
        refer(self, gates=gates)
        self.number = number
        self.down = nn.Linear(gates.size, width)
        self.up = nn.Linear(width, gates.size)
        nn.init.xavier_uniform_(self.down.weight)
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)
        like = next(gates.parameters())
        self.to(like.device, like.dtype)

    def after(self, args: Sequence[Tensor], kwargs: Mapping[str, Tensor], output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["hidden_states"]
        added = self.gates.gated(self.number, x.to(self.up.weight.dtype), lambda h: self.up(F.silu(self.down(h))))
        return output + added.to(output.dtype)


class PromptAttention(ModuleExpert):
    """Lets each token also attend to trained prompts, by a second softmax, times gates of the heads and the block.

    The prompts' keys and values are made by the base's own weights. Each head adds its result to its output, before
    the layer that joins the heads. The gates of heads `tanh(a)` start at zero (LLaMA-Adapter, arXiv 2303.16199); the
    last gate of the block is for the prompts.
    """

    learning_rate: ClassVar[float] = 3e-3
    not_mergeable_because: ClassVar[str] = BECAUSE
    gates: BlockGates
    attention: nn.Module

    def __init__(self, attention: nn.Module, gates: BlockGates, prompts: int) -> None:
        super().__init__()
        refer(self, gates=gates, attention=attention)
        layers: Any = attention
        self.head_size = layers.head_dim
        like = next(gates.parameters())
        self.prompts = nn.Parameter(torch.empty(prompts, gates.size, dtype=like.dtype, device=like.device))
        nn.init.normal_(self.prompts, std=1 / math.sqrt(gates.size))
        heads = layers.o_proj.weight.shape[1] // self.head_size
        self.heads = nn.Parameter(torch.zeros(heads, dtype=like.dtype, device=like.device))
        self._queries: Tensor | None = None

    def attach(self, module: nn.Module, name: str = "expert") -> None:
        super().attach(module, name)
        self._hooks += [
            module.get_submodule("q_proj").register_forward_hook(self._keep),
            module.get_submodule("o_proj").register_forward_pre_hook(self._add),
        ]

    def _keep(self, layer: nn.Module, args: Sequence[Tensor], output: Tensor) -> None:
        self._queries = output

    def _add(self, layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        assert self._queries is not None
        added = self.gates.gated(-1, self._queries, self.attended)
        self._queries = None
        return (args[0] + added.to(args[0].dtype),)

    def attended(self, queries: Tensor) -> Tensor:
        """Return what queries `(..., heads * head size)` find, before the block's gate, in the same shape."""
        layers: Any = self.attention
        keys = self._of_prompts(layers.k_proj)
        values = self._of_prompts(layers.v_proj)
        split = queries.unflatten(-1, (-1, self.head_size))
        if hasattr(layers, "q_norm"):
            split = layers.q_norm(split)
            keys = layers.k_norm(keys)
        # Several heads of queries share a head of keys.
        keys, values = (part.repeat_interleave(len(self.heads) // part.shape[1], 1) for part in (keys, values))
        scores = torch.einsum("...hd,phd->...hp", split, keys) / math.sqrt(self.head_size)
        shares = scores.to(self.prompts.dtype).softmax(-1)
        by_head = torch.einsum("...hp,phd->...hd", shares, values.to(shares.dtype)) * self.heads.tanh()[:, None]
        return by_head.flatten(-2)

    def _of_prompts(self, layer: Any) -> Tensor:
        """Return what the base's layer of keys or values makes of the prompts, `(prompts, heads, head size)`."""
        weight = read_weight(layer)
        return F.linear(self.prompts.to(weight.dtype), weight, layer.bias).unflatten(1, (-1, self.head_size))

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_queries": None}
