"""Every built-in expert type, and one of a user, keeps the contract of `check_expert`.

What is compiled stands in this file, because the first compilation of a process takes many seconds of imports.
"""

from functools import partial

import pytest
import torch
from testbed.ia3 import IA3Expert
from testbed.other_experts import BiasExpert, GatedExpert

from modular_experts.deltas import Dense
from modular_experts.experts import Expert, FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.kernels import native
from modular_experts.testing import check_expert

FACTORIES = {
    "element": partial(SparseExpert, keep_ratio=0.05),
    "element-dense-gradient": partial(SparseExpert, keep_ratio=0.4),
    "element-all": partial(SparseExpert, keep_ratio=1.0),
    "block-8": partial(SparseExpert, keep_ratio=0.3, granularity="block", block_size=8),
    "block-16": partial(SparseExpert, keep_ratio=0.5, granularity="block", block_size=16),
    "block-20": partial(SparseExpert, keep_ratio=0.9, granularity="block", block_size=20),
    "row": partial(SparseExpert, keep_ratio=0.3, granularity="row"),
    "column": partial(SparseExpert, keep_ratio=0.3, granularity="column"),
    "element-gathered": partial(SparseExpert, keep_ratio=0.05, backend="dense"),
    "element-native": partial(SparseExpert, keep_ratio=0.05, backend="native"),
    "block-native": partial(SparseExpert, keep_ratio=0.5, granularity="block", block_size=16, backend="native"),
    "block-gathered": partial(SparseExpert, keep_ratio=0.5, granularity="block", block_size=16, backend="dense"),
    "masked": partial(MaskedExpert, keep_ratio=0.3, dense_start=False),
    "masked-dense-start": partial(MaskedExpert, keep_ratio=0.3),
    "masked-block": partial(MaskedExpert, keep_ratio=0.3, granularity="block", block_size=8, dense_start=False),
    "masked-row": partial(MaskedExpert, keep_ratio=0.3, granularity="row", dense_start=False),
    "masked-column": partial(MaskedExpert, keep_ratio=0.3, granularity="column"),
    "lora": partial(LoRAExpert, rank=4),
    "lora-stabilized": partial(LoRAExpert, rank=4, rank_stabilized=True),
    "full": FullExpert,
    "user-ia3": IA3Expert,
    "user-bias": BiasExpert,
    "user-gated": GatedExpert,
}


@pytest.mark.parametrize("name", FACTORIES)
def test_expert_keeps_the_contract(name: str) -> None:
    if name.endswith("native") and not native.available():
        pytest.skip("there is no C++ compiler here")
    torch.manual_seed(3)
    check_expert(FACTORIES[name], compile=name in {"element", "lora", "full"})


class _MovesAtStart(LoRAExpert):
    """A wrong twin: not the base before training."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        torch.nn.init.ones_(self.up)


class _ExportsHalf(LoRAExpert):
    """A wrong twin: its delta is not what it computes."""

    def delta(self, weight, anchor):
        return super().delta(weight, anchor) * 0.5


class _HidesFromTraining(LoRAExpert):
    """A wrong twin: no gradient reaches its parameters."""

    forward = Expert.forward

    def delta(self, weight, anchor):
        return Dense(super().delta(weight, anchor).dense().detach() + 0.0 * (self.up.sum() + self.down.sum()))


@pytest.mark.parametrize(
    ("twin", "broken"),
    [(_MovesAtStart, "leave the"), (_ExportsHalf, "exported delta"), (_HidesFromTraining, "is zero")],
)
def test_battery_catches_a_wrong_twin(twin: type[Expert], broken: str) -> None:
    with pytest.raises(AssertionError, match=broken):
        check_expert(twin, compile=False)
