"""Load models that classify texts, with a place for the task heads of experts (`experts/task_heads.py`)."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

POOLED = "task_heads"
"""The name of the place in an encoder without a head."""


class HeadPlace(nn.Module):
    """Stands where the model's last layer gives logits; it passes vectors of size `width` on, and experts classify.

    `bias` tells whether a task head has one there.
    """

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.width = width
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Classifier:
    """What the class of a classifier has before the class of transformers; `head_place` names the `HeadPlace`."""

    head_place: str

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **more: Any
    ) -> Any:
        """Return an output of transformers, whose `logits` are `(rows, classes)`, without heads `(rows, width)`."""
        given = {name: value for name, value in more.items() if value is not None}
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **given)  # type: ignore[misc]


class _MeanOfTokens(_Classifier):
    """An encoder without a head: heads classify the mean of the last hidden states over the tokens."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **more: Any
    ) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden: Tensor = super().forward(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weights = mask.to(hidden.dtype)[..., None]
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return SequenceClassifierOutput(logits=getattr(self, POOLED)(pooled))


class AutoClassifier:
    """Loads a classifier as an Auto class of transformers does; experts bring the last layer, which the model lacks.

    Args:
        auto: `AutoModel` for an encoder, or `AutoModelForSequenceClassification`.
    """

    def __init__(self, auto: "type[_BaseAutoModelClass]") -> None:
        self._auto = auto

    def from_config(self, config: Any, **how: Any) -> "PreTrainedModel":
        return self._with_place(self._auto.from_config(config, **how))

    def from_pretrained(self, directory: Any, **how: Any) -> Any:
        """Return the model, and with `output_loading_info` also transformers' report."""
        loaded = self._auto.from_pretrained(directory, **how)
        if not how.get("output_loading_info"):
            return self._with_place(loaded)
        model, report = loaded
        model = self._with_place(model)
        has = {name for name, _ in model.named_parameters()}
        missing = {name for name in report["missing_keys"] if name in has}
        mismatched = {entry for entry in report["mismatched_keys"] if entry[0] in has}
        return model, {**report, "missing_keys": missing, "mismatched_keys": mismatched}

    def _with_place(self, model: Any) -> "PreTrainedModel":
        from transformers import AutoModel

        kind = type(model)
        if missing := {"input_ids", "attention_mask"} - set(inspect.signature(model.forward).parameters):
            raise ValueError(f"{kind.__name__} takes no {missing.pop()}, which batches need; take another encoder")
        if self._auto is AutoModel:
            # A layer for the first token alone, which many checkpoints lack.
            if getattr(model, "pooler", None) is not None:
                model.pooler = None
            place = POOLED
            stands = HeadPlace(model.config.hidden_size)
            mixin: type = _MeanOfTokens
        else:
            inside = {id(module) for module in model.base_model.modules()}
            last = [
                (name, module)
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and id(module) not in inside
            ]
            if not last or last[-1][1].out_features != model.config.num_labels:
                raise ValueError(f"{kind.__name__} has no last linear layer that gives the logits of classes")
            place, layer = last[-1]
            stands = HeadPlace(layer.in_features, layer.bias is not None)
            mixin = _Classifier
        parent, _, own = place.rpartition(".")
        setattr(model.get_submodule(parent), own, stands)
        # The same object with the same name of its class, as `injection` does with layers.
        model.__class__ = type(kind.__name__, (mixin, kind), {"head_place": place, "__module__": kind.__module__})
        return model
