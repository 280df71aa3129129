"""Write an expert as sparse weight patches of vLLM (0.33): new values for the weights of a running base.

vLLM's `SparseWeightPatch` has a tensor's name in the checkpoint, its `full_shape`, flat `indices` in int32, and
`values` in the checkpoint's dtype. It defines no file for them; here they lie in one of safetensors, under
`NAME/indices` and `NAME/values`, with all shapes as JSON under `shapes` of its metadata.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from modular_experts.base import Base
from modular_experts.base.files import MANIFEST, write_manifest
from modular_experts.deltas import all_finite
from modular_experts.library import StoredExpert, as_parents, check_target, new_directory, open_experts
from modular_experts.native.sparse_passes import add_rounded, unequal
from modular_experts.progress import Progress

PATCH_FILE = "patch.safetensors"


class WrittenPatch(NamedTuple):
    """How many tensors a patch changes, and how many values."""

    tensors: int
    changed: int


def export_patch(
    expert: str | Path | StoredExpert,
    out: str | Path,
    base: str | Path | Base | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
) -> WrittenPatch:
    """Write an expert or a merge as a patch: the base with it has the bits of the checkpoint that `apply` writes.

    The whole patch is in memory. The arguments are as for `export`.
    """
    target = check_target(out, overwrite, MANIFEST)
    (opened,) = open_experts([expert], base=base)
    found = Base.open(base, [opened])
    found.structure.check_fit(opened.shapes())
    if parts := [name for name in opened if name not in found.structure.weights]:
        raise ValueError(f"{opened.name} moves {parts[0]}, a part of a stored tensor; write a checkpoint with apply")
    tensors, shapes = dict[str, Tensor](), dict[str, list[int]]()
    for name in progress(list(opened)):
        stored = found.weights.read(name)
        total = add_rounded(stored, opened[name], stored.dtype).weight
        if not all_finite(total):
            raise ValueError(f"{name} plus its delta is not finite in {stored.dtype}; take a smaller scale")
        places = torch.from_numpy(unequal(total, stored)).view(-1).nonzero()[:, 0]
        if len(places) and places[-1] >= 2**31:
            raise ValueError(f"{name} has {total.numel()} entries, more than vLLM's indices in int32 can name")
        for key in found.weights.keys(name) if len(places) else ():
            tensors |= {f"{key}/indices": places.to(torch.int32), f"{key}/values": total.view(-1)[places]}
            shapes[key] = list(stored.shape)
    with new_directory(target, overwrite, MANIFEST) as directory:
        save_file(tensors, directory / PATCH_FILE, metadata={"format": "pt", "shapes": json.dumps(shapes)})
        identity = {"id": found.place, "revision": found.revision, "fingerprint": found.fingerprint}
        write_manifest(directory, {"base": identity, "experts": as_parents([opened])})
    return WrittenPatch(len(shapes), sum(one.numel() for one in tensors.values()) // 2)
