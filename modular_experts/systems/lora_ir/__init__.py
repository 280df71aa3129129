"""Plan LoRAs behind one gate of the prompt, after LoRA-IR (Ai et al., arXiv 2410.15385), a method for images."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.data import TaskMixture
from modular_experts.data.batch import Example
from modular_experts.data.rows import spread_evenly
from modular_experts.experts.expert import Expert, NotMergeable
from modular_experts.experts.lora import check_low_rank, first_factors
from modular_experts.experts.module_expert import ModuleExpert, refer
from modular_experts.experts.site import Factory, LayerPlan, Site, as_patterns, by_pattern
from modular_experts.merging.statistics import batches_by_length, name_of, prompt_statistics
from modular_experts.routing.classifier import Classifier
from modular_experts.routing.gates import CurrentGates, TopK
from modular_experts.routing.prompts import PromptGates, kept_tokens
from modular_experts.routing.router import check_reading

log = logging.getLogger(__name__)


@dataclass(eq=False)
class LoRAIR(LayerPlan):
    """LoRAs at each linear layer; one gate for all layers gives a prompt the LoRAs of its task.

    LoRA-IR restores images. This plan is its analogue for text, and repeats no result on images; the task of a prompt
    stands in the place of the degradation. The prior of its first stage, which modulates features, is left out.

    Training has two stages. First `fit` teaches a router the tasks of the data and freezes it: a softmax regression of
    the task of training prompts (`Classifier`), which reads the base's own hidden states. Then it trains the LoRAs,
    with the `k` likeliest of each prompt, weighted by the softmax of their logits. The data have as many held-in tasks
    as there are experts; expert `n` belongs to the `n`-th task in the order of names.

    Args:
        experts: Number of LoRAs at each layer, and of held-in tasks; at least 2.
        modules: Patterns of the layers that get LoRAs: ends of names, regular expressions, or `all-linear`.
        rank: Rank of a LoRA, from 1 to min(out, in).
        k: How many of them a prompt takes.
        alpha: The scale is alpha / rank.
        depths: Where the router reads prompts, rising: after these shares of the transformer blocks.
        prompts: The most training rows of a task that the router learns from, spread evenly over the task.
    """

    experts: int
    modules: str | Sequence[str] = "all-linear"
    rank: int = 8
    k: int = 1
    alpha: float = 16.0
    depths: Sequence[float] = (0.0, 0.25)
    prompts: int = 256

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ValueError(f"LoRAIR: experts={self.experts} must be at least 2, one for each task of the data")
        if not 1 <= self.k <= self.experts:
            raise ValueError(f"LoRAIR: k={self.k} is outside 1..{self.experts}, the number of experts")
        if self.prompts < 4:
            raise ValueError(f"LoRAIR: prompts={self.prompts} must be at least 4 rows of a task")
        check_reading("LoRAIR", self.depths)
        self.modules = as_patterns(self.modules)
        self.depths = list(self.depths)

    def __call__(self, sites: Sequence[Site]) -> Mapping[Site | str, Factory]:
        gates = CurrentGates()
        loras = partial(LoRAIRExpert, gates=gates, experts=self.experts, rank=self.rank, alpha=self.alpha)
        chosen = by_pattern(dict.fromkeys(self.modules, loras), "modules")(sites)
        gate = partial(TaskGate, gates=gates, experts=self.experts, k=self.k, depths=self.depths, prompts=self.prompts)
        return {"": gate} | dict(chosen)


class TaskGate(ModuleExpert):
    """Owns the router of the whole model, and makes the gates of each pass from its prompts."""

    not_mergeable_because: ClassVar[str] = "its router chooses by the prompt"
    # Each place of packed rows gets the gates of its row.
    moves_tokens_alone = True
    # The LoRAs' rate: a router that an optimizer never sees must not lower it.
    learning_rate: ClassVar[float] = 3e-3
    model: nn.Module

    def __init__(
        self, model: nn.Module, gates: CurrentGates, experts: int, k: int, depths: Sequence[float], prompts: int
    ) -> None:
        super().__init__()
        self.experts = experts
        self.k = k
        self.prompts = prompts
        refer(self, model=model)
        self.router = Classifier(reject=None, depths=depths, select=TopK(k))
        self.router.experts = experts
        config: Any = model.config
        size = config.get_text_config().hidden_size * len(self.router.depths)
        device = next(model.parameters()).device
        # A checkpoint is loaded into tensors of its sizes.
        self.router.weight = torch.zeros(experts, size, device=device)
        self.router.bias = torch.zeros(experts, device=device)
        self._gates = PromptGates(self.router, gates)

    def before_fit(self, module: Any, data: object) -> bool:
        """Teach the router the tasks of the data, unless it has learned, and log how well it knows others."""
        if self.router.weight.any():
            return False
        started = time.monotonic()
        if not isinstance(data, TaskMixture):
            raise ValueError(
                f"the router of LoRAIR learns the tasks of a TaskMixture, and the data are of type "
                f"{type(data).__name__}; give the trainer a TaskMixture as datamodule"
            )
        tasks = data.input_examples(["train"])
        if len(tasks) != self.experts:
            raise ValueError(
                f"LoRAIR has experts={self.experts}, and the data have {len(tasks)} held-in tasks; give as many "
                "experts as tasks, at least 2"
            )
        self.router.learn([], self._vectors(module.model, tasks, data, parts=True))
        sentence = f"the router learned {len(tasks)} tasks"
        if all("validation" in task["rows"] for task in data.contents.values()):
            vectors = self._vectors(module.model, data.input_examples(["validation"]), data, parts=False)
            right = sum(int((self.router.scores(own).argmax(1) == n).sum()) for n, own in enumerate(vectors))
            sentence += (
                f", and sends {right} of {sum(map(len, vectors))} validation prompts to the expert of their task"
            )
        log.info("%s, in %.1f s", sentence, time.monotonic() - started)
        return True

    def _vectors(self, model: Any, tasks: Mapping[str, list[Example]], data: TaskMixture, parts: bool) -> list[Tensor]:
        """Return the vectors `(rows, size)` of some prompts of each task, and with `parts` of a part of each."""
        vectors = []
        for _, examples in sorted(tasks.items()):
            batches = batches_by_length(spread_evenly(examples, self.prompts), data)
            read = prompt_statistics(model, batches, parts, self.router.depths)
            vectors.append(torch.cat([read[name_of(depth)].values for depth in self.router.depths], 1))
        return vectors

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not kept_tokens(kwargs) and not self.router.weight.any():
            raise ValueError(
                "the router of LoRAIR has not learned its tasks yet; `fit` teaches it, and in a training loop of your "
                "own its `before_fit` does"
            )
        self._gates(self.model, args, kwargs)


class LoRAIRExpert(NotMergeable, Expert):
    """Adds `scale * sum_e g_e up_e @ down_e`, with the gates `g` of the row's prompt; `up` starts at zero.

    All LoRAs of a layer are one product of rank `experts * rank`. Without gates, the base is alone.
    """

    learning_rate: ClassVar[float] = 3e-3
    not_mergeable_because: ClassVar[str] = TaskGate.not_mergeable_because
    moves_tokens_alone = TaskGate.moves_tokens_alone

    def __init__(
        self, weight: Tensor, gates: CurrentGates, experts: int = 2, rank: int = 8, alpha: float = 16.0
    ) -> None:
        super().__init__()
        check_low_rank(weight, rank)
        self.experts = experts
        self.rank = rank
        self.scale = alpha / rank
        self.gates = gates
        self.up, self.down = map(nn.Parameter, first_factors(weight, experts * rank))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        base = F.linear(x, weight, bias)
        if self.gates.gates is None:
            return base
        shares = self.gates.gates.dense(self.experts).to(self.down.dtype)
        inner = F.linear(x.to(self.down.dtype), self.down)
        # Some models give a layer all tokens of all rows in one dimension.
        by_row = inner.reshape(len(shares), -1, self.experts, self.rank) * shares[:, None, :, None]
        return base + F.linear(self.scale * by_row.view_as(inner), self.up).to(base.dtype)
