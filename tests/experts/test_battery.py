"""Every built-in expert type, and one of a user, keeps the contract of `check_expert`.

What is compiled stands in this file, because the first compilation of a process takes many seconds of imports.
"""

import warnings
from functools import partial

import pytest
import torch
from testbed.ia3 import IA3Expert
from testbed.other_experts import BiasExpert, GatedExpert
from testbed.quantised import load, put

from modular_experts.deltas import Dense
from modular_experts.experts import Expert, FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.native import kept_gradients as native
from modular_experts.native.kernel import kept_linear
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


@pytest.mark.parametrize("name", ["element", "lora"])
@pytest.mark.filterwarnings("ignore:.*not a leaf Tensor:UserWarning")  # by torch while it traces
def test_compiled_layers_beside_a_quantised_base_compute_the_same(name: str, tiny_llama_dir) -> None:
    pytest.importorskip("bitsandbytes")
    torch.compiler.reset()  # or one that has compiled much would compile no more
    mlp, x = put(load(tiny_llama_dir), FACTORIES[name]).model.layers[0].mlp, torch.randn(2, 8, 32)

    def step(mlp: torch.nn.Module) -> list[torch.Tensor]:
        mlp.zero_grad()
        loss = mlp(x).square().sum()
        loss.backward()
        return [loss.detach(), *(one.grad.clone() for one in mlp.parameters() if one.requires_grad)]

    found = step(mlp)
    assert len(found) > 3
    assert all(one.any() for one in found)
    torch.testing.assert_close(step(torch.compile(mlp, backend="aot_eager")), found)


@pytest.mark.skipif(not native.available(), reason="there is no C++ compiler here")
@pytest.mark.parametrize(("kind", "size"), [(native.NativeEntries, 1), (native.NativeTiles, 16)])
def test_a_compiled_layer_keeps_its_graph_whole_around_a_native_kernel(kind, size) -> None:
    kernel, x = kind(torch.tensor([1, 4]), (32, 48), (size, size)), torch.randn(20, 48)
    weight, values = torch.ones(32, 48), torch.zeros(kernel.gradient(x, torch.ones(20, 32)).shape, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return kept_linear(x, weight, None, values, kernel).sum()

    wanted = torch.autograd.grad(loss(x), values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own inner workings while it compiles
        found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), values)
    torch.testing.assert_close(found, wanted)


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


class _GivesATensor(_HidesFromTraining):
    def delta(self, weight, anchor):
        return super().delta(weight, anchor).dense()


@pytest.mark.parametrize(
    ("twin", "broken"),
    [
        (_MovesAtStart, "leave the"),
        (_ExportsHalf, "exported delta"),
        (_HidesFromTraining, "is zero"),
        (_GivesATensor, "_GivesATensor.delta must return a delta, got a Tensor; wrap a tensor in Dense"),
    ],
)
def test_battery_catches_a_wrong_twin(twin: type[Expert], broken: str) -> None:
    with pytest.raises((AssertionError, TypeError), match=broken):
        check_expert(twin, compile=False)
