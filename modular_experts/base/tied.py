"""Tell an untied copy of a base, whose head was copied from its embeddings, and write one.

`Base` calls these functions with itself.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from modular_experts.base.files import MANIFEST, copy_companions, fingerprint, read_layouts, write_manifest
from modular_experts.base.streaming import Layout, shard_writer, write_index
from modular_experts.library import check_target, new_directory
from modular_experts.library.record import read_json
from modular_experts.library.tensorfile import DTYPES


def head_and_embeddings(base: Any) -> tuple[str, str] | None:
    """Return the names of embeddings and head, equal if one tensor has both roles; None if one has no such weight."""
    model = base.structure.model
    names = dict[int, str]()
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), name)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings, head = (names.get(id(getattr(layer, "weight", None))) for layer in layers)
    return (embeddings, head) if embeddings and head else None


def untied_from(base: Any) -> dict[str, str] | None:
    """Return what a record keeps about the tied base that a base is the untied copy of, or None for any other base.

    That is the `fingerprint` of the tied base, which stores the same tensors without the head, and the names of the two
    weights, `head` and `embeddings`.
    """
    names = None if base.quantisation else head_and_embeddings(base)
    if names is None or names[0] == names[1]:
        return None
    few = [rows for _, _, rows in base.sample(names)]  # in which most heads differ already
    if len(few) < 2 or not torch.equal(*few) or not torch.equal(*map(base.weight, names)):
        return None
    embeddings, head = names
    return {"fingerprint": fingerprint(base.directory, base.stored_name(head)), "head": head, "embeddings": embeddings}


def untie(base: Any, out: str | Path, overwrite: bool = False) -> Path:
    """Write a base whose embeddings are its head as one with a head of its own, a copy of the embeddings.

    The copy computes the same. It takes adapters that move the head or the embeddings alone, and experts of the tied
    base combine with theirs.
    """
    target = check_target(out, overwrite, MANIFEST)
    if base.structure.model.config.is_encoder_decoder:
        raise ValueError(f"{base.place} has an encoder, which shares the embeddings; only causal models are untied")
    names = head_and_embeddings(base)
    layouts = read_layouts(base.directory)
    if base.quantisation or names is None or names[0] != names[1]:
        raise ValueError(f"{base.place} does not use one tensor as embeddings and head, so there is nothing to untie")
    head = next(name for name in base.structure.twins(names[0]) if name != names[0])
    weight = base.weight(names[0])
    if any(head in layout for layout in layouts.values()):
        if torch.equal(base.weight(head), weight):
            raise ValueError(
                f"{base.place} stores {head} although it is {names[0]}, so a copy would have the same fingerprint; "
                "write it anew with transformers' from_pretrained and save_pretrained, and untie what they write"
            )
        raise ValueError(
            f"{base.place} stores {head} with other values than {names[0]}, so transformers does not tie them; set "
            "tie_word_embeddings to false in its config.json instead"
        )
    # The name `model.safetensors` would stand for all weights.
    shards = [f"model-{number:05}-of-{len(layouts) + 1:05}.safetensors" for number in range(1, len(layouts) + 2)]
    files: dict[str, Layout] = {
        shard: {key: (DTYPES[dtype], tuple(shape)) for key, (dtype, shape) in layout.items() if key != head}
        for shard, layout in zip(shards, layouts.values(), strict=False)
    }
    files[shards[-1]] = {head: (weight.dtype, tuple(weight.shape))}
    with new_directory(target, overwrite, MANIFEST) as temporary:
        for file, shard in zip(layouts, shards, strict=False):
            shutil.copyfile(file, temporary / shard)
        with shard_writer(temporary / shards[-1], files[shards[-1]]) as write:
            write(weight)
        write_index(temporary, files)
        config = read_json(base.directory / "config.json", "so it is not the directory of a model")
        text = json.dumps(config | {"tie_word_embeddings": False}, indent=2)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
        copy_companions(base.directory, temporary)
        tied = {"id": base.place, "revision": base.revision, "fingerprint": base.fingerprint}
        write_manifest(temporary, {"base": tied, "untied": {"head": head, "embeddings": names[0]}})
    return target
