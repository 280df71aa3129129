"""Which class of transformers loads a checkpoint as a language model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modular_experts.library.record import read_json

if TYPE_CHECKING:
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


def auto_class(directory: Path) -> "type[_BaseAutoModelClass]":
    """Return the class that loads the language model of a checkpoint, whose `config.json` decides.

    A *wrapper* is a model with a vision or an audio tower beside its language model. `AutoModelForCausalLM` loads some
    wrappers whole, and the language model alone of others; `AutoModelForImageTextToText` loads those that it does not
    know.

    Raises:
        ValueError: The checkpoint has another task, or a type that transformers does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    config = read_json(directory / "config.json", "so it is not the directory of a model")
    kind = str(config.get("model_type"))
    causal = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, kind)
    wrappers = _names(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, kind)
    known = {*causal, *wrappers}
    if not known or AutoConfig.for_model(kind).is_encoder_decoder:
        raise ValueError(f"{directory} is a {kind!r} model; only causal language models that transformers knows work")
    declared = config.get("architectures") or []
    if declared and not known.intersection(declared):
        wanted = " or ".join(sorted(known))
        raise ValueError(f"{directory} is a {declared[0]}; only causal language models work, here {wanted}")
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def _names(table: Any, kind: str) -> list[str]:
    """Return the names of the classes for a type of models; most tables have one, or none."""
    names = table.get(kind, [])
    return [names] if isinstance(names, str) else list(names)
