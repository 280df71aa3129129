"""Which class of transformers loads a checkpoint: a language model, or an encoder that classifies."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modular_experts.base.classifier import AutoClassifier
from modular_experts.library.record import read_json

if TYPE_CHECKING:
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


def auto_class(directory: Path) -> "type[_BaseAutoModelClass] | AutoClassifier":
    """Return the class that loads the model of a checkpoint, whose `config.json` decides.

    A *wrapper* is a model with a vision or an audio tower beside its language model. `AutoModelForCausalLM` loads some
    wrappers whole, and the language model alone of others; `AutoModelForImageTextToText` loads those that it does not
    know. `AutoModelForSeq2SeqLM` loads encoder-decoders. `AutoClassifier` loads encoders such as BERT, and checkpoints
    of a class such as `LlamaForSequenceClassification`.

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
    classifying = _names(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, kind)
    declared = config.get("architectures") or []
    if set(classifying).intersection(declared):
        return AutoClassifier(transformers.AutoModelForSequenceClassification)
    if encoding and not set(causal).intersection(declared):
        known = encoding
        loader: type[_BaseAutoModelClass] = transformers.AutoModelForSeq2SeqLM
    elif _names(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, kind) and not set(causal).intersection(declared):
        return AutoClassifier(transformers.AutoModel)
    else:
        known = [*causal, *wrappers]
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
    needed = "only causal language models, encoder-decoders and classifiers of texts work"
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
