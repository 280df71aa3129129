"""Plan LoRAs beside selected tokens of the prompt, after PointLoRA (arXiv 2504.16023), a method for point clouds."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.experts.expert import NotMergeable
from modular_experts.experts.lora import LoRAExpert
from modular_experts.experts.module_expert import Arguments, ModuleExpert, refer
from modular_experts.experts.site import Factory, LayerPlan, Site, as_patterns, by_pattern
from modular_experts.routing.gates import mean_over_ranks, rows_at_hand
from modular_experts.routing.prompts import Growth, check_rows, kept_tokens, prompts_at_hand
from modular_experts.text import block_of


@dataclass(eq=False)
class PointLoRA(LayerPlan):
    """A LoRA at each linear layer, a shared MLP beside it, and tokens of the prompt once more in front of the sequence.

    PointLoRA trains transformers on point clouds. This plan is its analogue for text, and repeats no result on point
    clouds. A scorer looks at the embeddings of the prompt's tokens. The `tokens` with the largest scores, in their
    order, are multiplied by their scores, so that the loss teaches the scorer, and stand in front of the sequence,
    where every token attends to them. They take places of the model's context; their logits are dropped.

    A linear layer with input x adds `scale * up @ down @ x + mlp(x)`. All layers of one name and shape share the MLP
    (in -> hidden -> out, GELU), which starts at zero.

    Args:
        modules: Patterns of the layers that get a LoRA: ends of names, regular expressions, or `all-linear`.
        rank: Rank of a LoRA, from 1 to min(out, in).
        tokens: How many tokens of each prompt are selected.
        hidden: Hidden size of the shared MLPs.
        alpha: The LoRA's scale is alpha / rank; the released code has none.
        entropy: Weight of the mean entropy of the scores, in nats, in the loss. A positive one drives scores to 0 and
            1, a negative one to 0.5, as -0.004 of the released code does.
    """

    modules: str | Sequence[str] = "all-linear"
    rank: int = 8
    tokens: int = 8
    hidden: int = 32
    alpha: float = 16.0
    entropy: float = 0.004

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.hidden < 1:
            raise ValueError(f"PointLoRA: tokens={self.tokens} and hidden={self.hidden} must be at least 1")
        if not math.isfinite(self.entropy):
            raise ValueError(f"PointLoRA: entropy={self.entropy} must be a number")
        self.modules = as_patterns(self.modules)

    def __call__(self, sites: Sequence[Site]) -> Mapping[Site | str, Factory]:
        owner: list[TokenSelection] = []

        def own(module: nn.Module) -> TokenSelection:
            owner.append(TokenSelection(module, self.tokens, self.hidden, self.entropy))
            return owner[0]

        def lora(weight: Tensor, site: Site) -> PointLoRAExpert:
            return PointLoRAExpert(weight, owner[0].shared(site.layer, weight), self.rank, self.alpha)

        chosen = by_pattern(dict.fromkeys(self.modules, lora), "modules")(sites)
        blocks = [block for site in sites if (block := block_of(f"{site.name}."))]
        if not blocks:
            raise ValueError("PointLoRA: the model has no transformer blocks, in front of which tokens could stand")
        # What holds the list of blocks turns tokens into hidden states; the model around it has the head.
        body = blocks[0].rpartition(".")[0].rpartition(".")[0]
        return {body: own} | dict(chosen)


class TokenSelection(ModuleExpert):
    """Owns the scorer and the shared MLPs of a model without its head, and puts tokens in front of the sequence."""

    learning_rate: ClassVar[float] = LoRAExpert.learning_rate
    not_mergeable_because: ClassVar[str] = "it selects tokens of the prompt"
    embedding: nn.Module

    def __init__(self, module: nn.Module, tokens: int, hidden: int, entropy: float) -> None:
        super().__init__()
        self.tokens = tokens
        self.hidden = hidden
        self.entropy = entropy
        embedding: Any = module.get_input_embeddings()  # type: ignore[operator]
        refer(self, embedding=embedding)
        self._names = list(inspect.signature(module.forward).parameters)
        self._context: int | None = getattr(module.config, "max_position_embeddings", None)
        size = embedding.weight.shape[1]
        self.scorer = _network(embedding.weight, size, size // 2, 1)
        self.mlps = nn.ModuleDict()
        self._shown = torch.ones(1, 0, dtype=torch.bool)
        self._dropped = 0
        self._growth = Growth()
        self._entropies: Tensor | None = None

    @property
    def tokens_in_front(self) -> int:
        return self.tokens

    def shared(self, layer: str, weight: Tensor) -> nn.Module:
        """Return the MLP of all layers of a name and a shape; the first of them makes it."""
        out, size = weight.shape
        name = f"{layer}_{out}x{size}"
        if name not in self.mlps:
            first, _, last = self.mlps[name] = _network(weight, size, self.hidden, out)
            nn.init.trunc_normal_(first.weight, std=0.02)
            for zero in (first.bias, last.weight, last.bias):
                nn.init.zeros_(zero)
        return self.mlps[name]

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        self._dropped = 0
        named = dict(zip(self._names, args, strict=False)) | kwargs
        check_rows(named)
        ids = named.get("input_ids")
        mask = named.get("attention_mask")
        places = named.get("position_ids")
        if isinstance(mask, dict) or (mask is not None and mask.ndim != 2):
            raise ValueError("PointLoRA lengthens a mask of shape (rows, length); generate with a dynamic cache")
        embedded: Tensor = self.embedding(ids) if ids is not None else named["inputs_embeds"]
        rows, length, _ = embedded.shape
        # The selected tokens are among the kept keys and values.
        past = kept_tokens(named) - self._shown.shape[1] if kept_tokens(named) else 0
        if mask is None:
            mask = torch.ones(rows, past + length, dtype=torch.int64, device=embedded.device)
        if not kept_tokens(named):
            if ids is not None:
                self._growth.check(ids, named)
            chosen, self._shown = self._select(embedded, mask.bool(), prompts_at_hand(length))
            named |= {"input_ids": None, "inputs_embeds": torch.cat([chosen, embedded], 1)}
            self._dropped = chosen.shape[1]
        named["attention_mask"] = mask = torch.cat([self._shown.to(mask.dtype), mask], 1)
        if self._context is not None and mask.shape[1] > self._context:
            raise ValueError(
                f"PointLoRA puts {self._shown.shape[1]} tokens in front of {past + length}, and the model's context is "
                f"{self._context}; let rows and answers be at most {max(self._context - self.tokens, 0)} tokens, "
                "or select fewer"
            )
        if "position_ids" in self._names:
            # Tokens move by as many places as stand in front of them.
            counted = (mask.cumsum(1) - 1).clamp(min=0)
            if places is None:
                named["position_ids"] = counted[:, -(self._dropped + length) :]
            else:
                moved = places + self._shown.sum(1, keepdim=True)
                named["position_ids"] = torch.cat([counted[:, : self._dropped], moved], 1)
        return (), named

    def _select(self, embedded: Tensor, tokens: Tensor, prompt: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the selected tokens times their scores, `(rows, count, size)`, and which of the places are filled."""
        prompt = tokens if prompt is None else tokens & prompt
        logits = self.scorer(embedded.to(self.scorer[0].weight.dtype)).squeeze(-1)
        scores = logits.sigmoid()
        if self.training and self.entropy:
            entropies = (scores * F.softplus(-logits) + (1 - scores) * F.softplus(logits)).where(prompt, 0.0)
            means = entropies.sum(1) / prompt.sum(1).clamp(min=1)
            counting = rows_at_hand().tokens
            # A filler row has no tokens that count.
            self._entropies = means if counting is None else means[counting.any(1)]
        # A stable sort, because `topk` chooses among equal scores by chance.
        ranked = scores.detach().masked_fill(~prompt, -1.0).sort(dim=1, descending=True, stable=True).indices
        chosen = ranked[:, : self.tokens]
        chosen = chosen.masked_fill(~prompt.gather(1, chosen), -1).sort(1).values
        there = chosen >= 0
        chosen = chosen.clamp(min=0)
        taken = embedded.gather(1, chosen[..., None].expand(-1, -1, embedded.shape[-1]))
        return taken * scores.gather(1, chosen)[..., None].to(taken.dtype), there

    def after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._dropped:
            return output
        output.last_hidden_state = output.last_hidden_state[:, self._dropped :]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(states[:, self._dropped :] for states in output.hidden_states)
        return output

    def extra_loss(self) -> dict[str, Tensor]:
        entropies = self._entropies
        self._entropies = None
        if entropies is None:
            return {}
        rows = mean_over_ranks(entropies.new_tensor(float(len(entropies)))).clamp(min=1e-6)
        return {"entropy": self.entropy * entropies.sum() / rows}


class PointLoRAExpert(NotMergeable, LoRAExpert):
    """Adds `scale * up @ down @ x + mlp(x)`, with an MLP that other layers share and a `TokenSelection` owns."""

    not_mergeable_because: ClassVar[str] = "its MLP is not linear"
    mlp: nn.Module

    def __init__(self, weight: Tensor, mlp: nn.Module, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__(weight, rank, alpha)
        refer(self, mlp=mlp)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = super().forward(x, weight, bias)
        return out + self.mlp(x.to(self.down.dtype)).to(out.dtype)


def _network(like: Tensor, size: int, hidden: int, out: int) -> Any:
    made = partial(nn.Linear, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return nn.Sequential(made(size, hidden), nn.GELU(), made(hidden, out))
