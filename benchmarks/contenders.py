"""What `sparse_step.py` compares: a piece of work (a base, the layers that are trained, a batch), and ways to train it.

Every way trains as many entries as LoRA of the work's rank, so that only how they are trained differs.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modular_experts.experts import Expert, FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.experts.expert import InPlaceExpert
from modular_experts.injection import expert_layers, inject

__all__ = ["CONTENDERS", "Contender", "Step", "Work", "language_model", "missing", "pretrained"]

PROJECTIONS = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SIZES: dict[bool, dict[str, Any]] = {
    False: {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152},
    True: {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 1024},
}


@dataclass(frozen=True)
class Work:
    """A base, which of its layers are trained, and one batch.

    Args:
        base: The frozen base, float32.
        modules: Regular expression of the names of the layers that are trained.
        forward: From a model to its loss; the batch's input requires a gradient, as behind other layers.
        tokens: Of the batch.
        rank: Of the LoRA whose number of trained entries all take.
    """

    base: nn.Module
    modules: str
    forward: Callable[[nn.Module], Tensor]
    tokens: int
    rank: int

    def shapes(self, pattern: str) -> list[tuple[int, int]]:
        """Return `(out, in)` of each linear layer whose name matches."""
        linear = [(name, layer) for name, layer in self.base.named_modules() if isinstance(layer, nn.Linear)]
        return [(m.out_features, m.in_features) for name, m in linear if re.fullmatch(pattern, name)]

    @property
    def entries(self) -> int:
        """Number of entries of all linear layers, trained or not."""
        return sum(rows * columns for rows, columns in self.shapes(".*"))

    @property
    def keep(self) -> float:
        """Share of the trained layers' entries that LoRA of this rank has."""
        shapes = self.shapes(self.modules)
        return self.rank * sum(map(sum, shapes)) / sum(rows * columns for rows, columns in shapes)


def language_model(quick: bool) -> Work:
    """Return a Llama of 135 million parameters with random weights and 4 x 128 tokens, or a tiny one."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[quick], tie_word_embeddings=True, use_cache=False)
    base = LlamaForCausalLM(config).requires_grad_(False)
    tokens = torch.randint(config.vocab_size, (2, 32) if quick else (4, 128))
    vectors = base.get_input_embeddings()(tokens)

    def forward(model: nn.Module) -> Tensor:
        return model(inputs_embeds=vectors.detach().requires_grad_(), labels=tokens).loss

    return Work(base, PROJECTIONS, forward, tokens.numel(), rank=16)


def pretrained(place: str, quick: bool, dtype: str = "float32") -> tuple[Any, Any]:
    """Return the frozen model and the tokenizer of a directory; quick: the tiny model with as many tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    if quick:
        model: Any = language_model(True).base
        model.resize_token_embeddings(len(tokenizer))
    else:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype))
    return model.requires_grad_(False), tokenizer


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Args:
        name: Its row in the tables.
        equip: Gives a model, frozen so far, what is trained.
        operations: Per token and kept entry, what a step needs beyond a frozen one: 2 for the entry's gradient, 6 for
            an entry of LoRA, which is also passed forward and backward.
        owns_base: It writes all over the base, so it needs one of its own.
    """

    name: str
    equip: Callable[[nn.Module, Work], nn.Module]
    operations: int = 2
    owns_base: bool = False

    def floor(self, work: Work, kept: int) -> float:
        """Return the operations of a step over those of a frozen one, counted over all linear layers."""
        return 1 + self.operations * kept / (4 * work.entries)


class Step:
    """One training step of a contender: forward, backward, AdamW, and the write of what it changed.

    Contenders share one base, unless `alone` in a process: `rest` takes out what a step has written into it.
    """

    def __init__(self, contender: Contender, work: Work, alone: bool = False) -> None:
        torch.manual_seed(0)
        shared = {} if contender.owns_base else {id(parameter): parameter for parameter in work.base.parameters()}
        model = work.base if alone else copy.deepcopy(work.base, shared)
        self.work, self.model = work, contender.equip(model, work).train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, fused=True) if self.trained else None
        assert all(parameter.dtype == torch.float32 for parameter in self.trained)
        assert not any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())

    def __call__(self, before_update: Callable[[], None] = lambda: None) -> None:
        self.work.forward(self.model).backward()
        before_update()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def rest(self) -> None:
        """Give the shared base back as it was; the next step writes its values again."""
        for _, layer in expert_layers(self.model):
            if isinstance(layer.expert, InPlaceExpert) and not layer.expert.trains_weight:
                layer.expert.restore(layer.matrix, layer.matrix.detach)

    def facts(self) -> dict[str, int]:
        """Return how much is trained and kept, and what the optimizer holds, after a first step."""
        states = self.optimizer.state if self.optimizer is not None else {}
        assert set(states) == set(self.trained), "a gradient must reach all that is trained, and nothing else"
        tensors = [value for state in states.values() for value in state.values()]
        masks = [layer.expert.mask for _, layer in expert_layers(self.model) if isinstance(layer.expert, MaskedExpert)]
        trained = sum(parameter.numel() for parameter in self.trained)
        return {
            "trained": trained,
            "kept": int(sum(mask.sum() for mask in masks)) if masks else trained,
            "optimizer_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            "counter_bytes": sum(tensor.element_size() for tensor in tensors if tensor.numel() == 1),
        }


class EvenShare:
    """Makes sparse experts of whole units, rounded so that the number kept in all layers together comes out right."""

    def __init__(self, keep: float, settings: dict[str, Any]) -> None:
        self.keep, self.settings, self.left_over = keep, settings, 0.0

    def __call__(self, weight: Tensor) -> Expert:
        rows, columns = weight.shape
        side = self.settings.get("block_size", 1)
        size = {"row": columns, "column": rows}.get(self.settings["granularity"], side**2)
        wanted = self.keep * weight.numel() + self.left_over
        units = max(1, round(wanted / size))
        self.left_over = wanted - units * size
        return SparseExpert(weight, keep_ratio=(units + 0.5) * size / weight.numel(), **self.settings)


def _expert(make: Callable[[Work], Callable[[Tensor], Expert]]) -> Callable[[nn.Module, Work], nn.Module]:
    def equip(model: nn.Module, work: Work) -> nn.Module:
        inject(model, make(work), work.modules)
        return model

    return equip


def _peer(make: Callable[[Work], peft.PeftConfig]) -> Callable[[nn.Module, Work], nn.Module]:
    return lambda model, work: peft.get_peft_model(model, make(work))


def _sparse(name: str, granularity: Literal["element", "block", "row", "column"], **settings: Any) -> Contender:
    settings |= {"granularity": granularity}
    return Contender(name, _expert(lambda work: EvenShare(work.keep, settings)))


CONTENDERS = [
    Contender("frozen", lambda model, work: model),
    Contender("full", _expert(lambda work: FullExpert), owns_base=True),
    Contender(
        "PEFT LoRA",
        _peer(lambda w: peft.LoraConfig(r=w.rank, lora_alpha=w.rank, lora_dropout=0.0, target_modules=w.modules)),
        operations=6,
    ),
    Contender("PEFT SHiRA", _peer(lambda w: peft.ShiraConfig(r=w.rank, random_seed=0, target_modules=w.modules))),
    Contender(
        "PEFT Super-Tuning", _peer(lambda w: peft.SupertuningConfig(sparsity=1 - w.keep, target_modules=w.modules))
    ),
    Contender(
        "dense, masked",
        _expert(lambda work: lambda weight: MaskedExpert(weight, keep_ratio=work.keep, dense_start=False)),
    ),
    Contender("LoRA", _expert(lambda work: lambda weight: LoRAExpert(weight, rank=work.rank)), operations=6),
    _sparse("entries, sampled", "element", backend="sampled"),
    _sparse("entries, native", "element", backend="native"),
    _sparse("tiles of 16, block_rows", "block", block_size=16, backend="block_rows"),
    _sparse("tiles of 16, native", "block", block_size=16, backend="native"),
    _sparse("rows, slices", "row", backend="slices"),
    _sparse("columns, slices", "column", backend="slices"),
]


def missing(contender: Contender) -> str | None:
    """Return why a contender cannot run here, after a step of it with a tiny model."""
    try:
        Step(contender, language_model(quick=True))()
    except ValueError as error:  # no compiler, for example
        return str(error)
    return None
