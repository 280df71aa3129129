"""Placeholder until the native kernels land (overwrite this file)."""

from __future__ import annotations

import torch

from modular_experts.kernels.kernel import KeptGradient


def available() -> bool:
    return False


def computes(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16)


class NativeEntries(KeptGradient):
    name = "native"

    def gradient(self, x, grad):
        raise NotImplementedError


class NativeBlocks(NativeEntries):
    pass
