"""Reading: the YAML file of a mergekit recipe, checked.

mergekit passes over what it does not know and stops late on what it cannot do. Here a recipe is refused at once if it
has a key that mergekit would not use, or asks for something that is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modular_experts.interop.mergekit.configuration import Configuration, Settings
from modular_experts.interop.mergekit.keys import as_mapping, check_keys, read_yaml
from modular_experts.interop.mergekit.parameters import Method, method_named
from modular_experts.interop.mergekit.references import Reference, read_reference
from modular_experts.interop.mergekit.sources import SourceReader, read_settings

__all__ = ["read_configuration"]

_KEYS = {
    *("merge_method", "base_model", "parameters", "models", "slices", "modules", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
}
_OTHER_PROGRAMS = {
    "gate_mode": "a mixture of experts (mergekit-moe)",
    "experts": "a mixture of experts (mergekit-moe)",
    "genome": "a search (mergekit-evolve)",
}
_DTYPES = ("float32", "bfloat16", "float16")


def read_configuration(file: str | Path) -> Configuration:
    """Read a recipe.

    Args:
        file: The YAML file that `mergekit-yaml` takes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no recipe, has an unknown key, or asks for what is not supported.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {file}; give the YAML file that mergekit-yaml takes")
    documents = read_yaml(path.read_text(encoding="utf-8"), str(file))
    if len(documents) != 1:
        raise ValueError(f"{file} has {len(documents)} documents; only one merge in a file is supported")
    return _configuration(as_mapping(documents[0], str(file)), str(file))


def _configuration(recipe: Mapping[str, Any], where: str) -> Configuration:
    for key, program in _OTHER_PROGRAMS.items():
        if key in recipe:
            raise ValueError(f"{where} is the configuration of {program}, which is not supported")
    check_keys(recipe, _KEYS, where)
    if "merge_method" not in recipe:
        raise ValueError(f"{where} has no merge_method; add one, such as merge_method: ties")
    method = method_named(recipe["merge_method"])
    base = recipe.get("base_model")
    reference = None if base is None else read_reference(base, "base_model")
    if method.base and reference is None:
        raise ValueError(f"merge_method {recipe['merge_method']} needs a base_model, and {where} names none")
    body, prefix, of_module = _body(recipe, method)
    reader = SourceReader(method, reference, prefix)
    parts = reader.of_models(body["models"]) if "models" in body else reader.of_slices(body["slices"])
    _check_models(recipe["merge_method"], method, [source.model for source in parts[0].sources], reference)
    return Configuration(
        name=recipe["merge_method"],
        slices=parts,
        settings=read_settings(recipe.get("parameters"), method, "parameters"),
        module_settings=of_module,
        base=reference,
        dtype=_dtype(recipe, "dtype"),
        out_dtype=_dtype(recipe, "out_dtype"),
        tokenizer=_tokenizer(recipe, reference),
        source=recipe,
    )


def _body(recipe: Mapping[str, Any], method: Method) -> tuple[Mapping[str, Any], str, Settings]:
    """Return the mapping that has `models` or `slices`, its place in the file, and the settings of the module."""
    given = [key for key in ("models", "slices", "modules") if recipe.get(key)]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise ValueError(f"exactly one of models, slices and modules must be given, got {found}")
    if given == ["modules"]:
        modules = as_mapping(recipe["modules"], "modules")
        if list(modules) != ["default"]:
            raise ValueError(f"only models of one module, default, are supported; modules names {', '.join(modules)}")
        module = as_mapping(modules["default"], "modules.default")
        check_keys(module, {"models", "slices", "parameters"}, "modules.default")
        if bool(module.get("models")) == bool(module.get("slices")):
            raise ValueError("modules.default must have either models or slices")
        where = "modules.default."
        settings = read_settings(module.get("parameters"), method, f"{where}parameters")
        return {key: module[key] for key in ("models", "slices") if module.get(key)}, where, settings
    return {given[0]: recipe[given[0]]}, "", {}


def _check_models(name: str, method: Method, models: Sequence[Reference], base: Reference | None) -> None:
    experts = [model for model in models if model != base]
    if not experts:
        raise ValueError(f"merge_method {name} has no model to merge but the base; name at least one more")
    if method.models is not None and len(experts) != method.models:
        raise ValueError(f"merge_method {name} takes {method.models} model(s) beside the base, got {len(experts)}")
    if name == "model_stock" and len(experts) < 2:
        raise ValueError("merge_method model_stock needs two models beside the base, got 1")


def _dtype(recipe: Mapping[str, Any], key: str) -> str | None:
    name = recipe.get(key)
    if name is None:
        return None
    plain = str(name).removeprefix("torch.")
    if plain not in _DTYPES:
        raise ValueError(f"{key} must be one of {', '.join(_DTYPES)}, got {name!r}")
    return plain


def _tokenizer(recipe: Mapping[str, Any], base: Reference | None) -> bool:
    """Return whether the base's tokenizer is asked for, which is the only one that can be."""
    if recipe.get("chat_template") is not None:
        raise ValueError("chat_template is not supported; leave it out, and set it on the merged model's tokenizer")
    source, tokenizer = recipe.get("tokenizer_source"), recipe.get("tokenizer")
    if source is not None and tokenizer is not None:
        raise ValueError("tokenizer_source and tokenizer say the same; give only one of them")
    if tokenizer is not None:
        settings = as_mapping(tokenizer, "tokenizer")
        check_keys(settings, {"source", "tokens", "pad_to_multiple_of"}, "tokenizer")
        for key in ("tokens", "pad_to_multiple_of"):
            if settings.get(key):
                raise ValueError(f"tokenizer.{key} is not supported; only models of one vocabulary are merged")
        source = settings.get("source", "union")
    if source is None:
        return False
    if source == "union":
        raise ValueError(
            "a union of tokenizers is not supported; only models of one vocabulary are merged, with the tokenizer of "
            "the base (tokenizer_source: base)"
        )
    if base is None or (source != "base" and read_reference(source, "tokenizer_source") != base):
        raise ValueError(f"the tokenizer must be that of base_model, got {source!r}; write tokenizer_source: base")
    return True
