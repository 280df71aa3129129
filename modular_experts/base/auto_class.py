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
    know. `AutoModelForSeq2SeqLM` loads encoder-decoders.

    Raises:
        ValueError: The checkpoint has another task, or a type that transformers does not know.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    config = read_json(directory / "config.json", "so it is not the directory of a model")
    kind = str(config.get("model_type"))
    causal = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, kind)
    wrappers = _names(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, kind)
    encoding = _names(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, kind)
    declared = config.get("architectures") or []
    loader: type[_BaseAutoModelClass]
    if encoding and not set(causal).intersection(declared):
        known = encoding
        loader = transformers.AutoModelForSeq2SeqLM
    else:
        known = [*causal, *wrappers]
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
    needed = "only causal language models and encoder-decoders work"
    if not known:
        raise ValueError(f"{directory} is a {kind!r} model; {needed}, and only those that transformers knows")
    if declared and not set(known).intersection(declared):
        wanted = " or ".join(sorted(set(known)))
        raise ValueError(f"{directory} is a {declared[0]}; {needed}, here {wanted}")
    return loader


def _names(table: Any, kind: str) -> list[str]:
    """Return the names of the classes for a type of models; most tables have one, or none."""
    names = table.get(kind, [])
    return [names] if isinstance(names, str) else list(names)
