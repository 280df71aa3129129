"""The part of a model that reads text: the language model in a wrapper with a vision tower, and an encoder."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from modular_experts.text import block_of

_BEFORE_BLOCKS = ("model", "language_model", "text_model")


def language_model(model: nn.Module) -> str | None:
    """Return the name of the language model in a wrapper, or None for any other model."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return None
    return _decoder(model)


def prompt_reader(model: Any) -> nn.Module:
    """Return the part of a model that reads prompts: the encoder of an encoder-decoder, and else the model."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return model.get_encoder() if is_encoder_decoder and hasattr(model, "get_encoder") else model


def is_classifier(model: nn.Module) -> bool:
    """Return whether a model classifies prompts by task heads (`base/classifier.py`), and writes no text."""
    return hasattr(model, "head_place")


def acts_on_answers(model: nn.Module) -> bool:
    """Return whether the experts of a model act on answers alone (`injection/answer_only.py`)."""
    return hasattr(model, "answer_only")


def reads_prompts_apart(model: nn.Module) -> bool:
    """Return whether a model reads a prompt without the answer behind it.

    An encoder-decoder does, a classifier, and a model whose experts act on answers alone.
    """
    return is_classifier(model) or acts_on_answers(model) or prompt_reader(model) is not model


def _decoder(model: Any) -> str:
    """Return the name of the module that holds the transformer blocks."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def blocks_of(model: nn.Module) -> list[str]:
    """Return the names of the transformer blocks of the language model, in their order."""
    text = language_model(model)
    blocks = dict.fromkeys(block_of(name) for name, _ in model.named_parameters())
    return [block for block in blocks if block and (text is None or block.startswith(f"{text}."))]


def renamed(name: str, model: nn.Module, other: nn.Module) -> str:
    """Return the name that a layer or a weight of a model has in another class of the same checkpoint.

    The classes hold the transformer blocks under different names.
    """
    here, there = _decoder(model), _decoder(other)
    # In Llama 4 the decoder is the whole causal model, which has no name in itself.
    if here and not name.startswith(f"{here}."):
        return name
    inside = name.removeprefix(f"{here}.") if here else name
    return f"{there}.{inside}" if there else inside


def layers_of(names: Iterable[str], model: nn.Module) -> dict[str, str | None]:
    """Return for names of layers, which another class of the same checkpoint may have given, the names in a model.

    Classes differ in the words of `_BEFORE_BLOCKS` that stand before the blocks. A name that no layer has gets None.
    """
    layers = {layer for layer, _ in model.named_modules()} - {""}
    decoder = _decoder(model)

    def layer_of(name: str) -> str | None:
        parts = name.split(".")
        candidates = [name]
        while parts[0] in _BEFORE_BLOCKS:
            parts = parts[1:]
            candidates += [".".join([decoder, *parts]), ".".join(parts)]
        return next((candidate for candidate in candidates if candidate in layers), None)

    return {name: layer_of(name) for name in names}
