"""The part of a model that reads text: the language model in a wrapper with a vision tower, and an encoder."""

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
    """Return the name in another class of the same checkpoint of a layer or a weight, named as in a model.

    They differ in what stands before the number of the block.
    """
    here, there = (f"{decoder}." if (decoder := _decoder(one)) else "" for one in (model, other))
    return there + name.removeprefix(here) if name.startswith(here) else name


def layer_of(name: str, model: nn.Module) -> str | None:
    """Return the name in a model of a layer whose name another class of the same checkpoint may have given, if any.

    Before the blocks stand some of the words in `_BEFORE_BLOCKS`.
    """
    layers = {layer for layer, _ in model.named_modules()} - {""}
    parts = name.split(".")
    candidates = [name]
    while parts[0] in _BEFORE_BLOCKS:
        parts = parts[1:]
        candidates += [".".join([_decoder(model), *parts]), ".".join(parts)]
    return next((candidate for candidate in candidates if candidate in layers), None)
