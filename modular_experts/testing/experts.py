"""A public battery of checks for expert types, built-in or your own: `check_expert(lambda weight: MyExpert(weight))`.

Each check builds a small model with two linear layers, so that a whole battery takes seconds. A check that fails
raises an `AssertionError` that says what the expert broke.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modular_experts.experts.expert import Expert
from modular_experts.injection import eject, expert_layers, inject, task_vector

__all__ = ["check_expert"]

Factory = Callable[[Tensor], Expert]


def check_expert(factory: Factory, compile: bool = True) -> None:
    """Check that an expert type keeps the contract of `Expert`.

    Args:
        factory: Makes an expert for a weight `(out, in)`, as the argument `expert` of `ExpertModule` does.
        compile: Also check under `torch.compile`, which needs a C++ compiler and some seconds.

    Raises:
        AssertionError: It does not; the message names the promise.
    """
    for dtype in (torch.float32, torch.bfloat16):
        _check_identity_at_start(factory, dtype)
        _check_gradients(factory, dtype)
        _check_export_reproduces(factory, dtype)
    _check_eject(factory)
    _check_copies(factory)
    _check_state_dict(factory)
    _check_gradient_checkpointing(factory)
    if compile:
        _check_compile(factory)


class _Network(nn.Module):
    """Two linear layers around a non-linearity; `first` has a bias and a width that no tile divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 36)
        self.last = nn.Linear(36, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def _network(dtype: torch.dtype = torch.float32) -> _Network:
    torch.manual_seed(0)
    return _Network().to(dtype)


def _equipped(factory: Factory, dtype: torch.dtype = torch.float32) -> _Network:
    network = _network(dtype)
    inject(network, factory, ".*")
    return network.eval()


def _inputs(dtype: torch.dtype = torch.float32, rows: int = 6) -> Tensor:
    return torch.randn(2, rows // 2, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def _train(network: nn.Module, steps: int = 3, forward: Callable[[Tensor], Tensor] | None = None) -> list[float]:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    x = _inputs(network.get_parameter("first.bias").dtype)
    losses = []
    for _ in range(steps):
        outputs = network(x) if forward is None else forward(x)
        loss = F.mse_loss(outputs.float(), torch.ones(2, 3, 20))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _base_weights(dtype: torch.dtype) -> Callable[[str], Tensor]:
    base = _network(dtype).state_dict()
    return lambda name: base[name]


def _check_identity_at_start(factory: Factory, dtype: torch.dtype) -> None:
    x = _inputs(dtype)
    gap = (_equipped(factory, dtype)(x).float() - _network(dtype)(x).float()).abs().max()
    rounding = torch.finfo(dtype).eps  # of outputs below one
    assert gap <= rounding, f"before training, an expert must leave the {dtype} model as it is; it moves by {gap:.1e}"


def _check_gradients(factory: Factory, dtype: torch.dtype) -> None:
    network = _equipped(factory, dtype)
    _train(network, steps=1)  # types that start one factor at zero give the other no gradient before the first step
    x = _inputs(dtype).requires_grad_()
    network(x).float().square().sum().backward()
    assert x.grad is not None, "the gradient must reach the layer's input"
    assert bool(x.grad.any()), "the gradient of the layer's input must not be zero"
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained, "an expert must train something"
    for name, parameter in network.named_parameters():
        if name not in trained:
            assert parameter.grad is None, f"{name} is frozen but has a gradient"
            continue
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert bool(parameter.grad.any()), f"the gradient of {name} is zero"
        assert parameter.dtype == torch.float32, f"{name} is trained in {parameter.dtype}; small steps need float32"


def _check_export_reproduces(factory: Factory, dtype: torch.dtype) -> None:
    network, plain, x = _equipped(factory, dtype), _network(dtype), _inputs(dtype)
    losses = _train(network, steps=5)
    assert losses[-1] < losses[0], f"five steps must lower the loss, but it went from {losses[0]} to {losses[-1]}"
    with torch.no_grad():
        for name, delta in task_vector(network, _base_weights(dtype)):
            assert delta.shape == plain.get_parameter(name).shape, f"the delta of {name} must have the weight's shape"
            assert delta.dtype == torch.float32, "an exported delta must be float32"
            delta.add_to(plain.get_parameter(name))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    gap = (network(x).float() - plain(x).float()).abs().max()
    assert gap <= tolerance, f"base plus exported delta must give the trained outputs in {dtype}; gap {gap:.1e}"


def _check_eject(factory: Factory) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        network, base = _equipped(factory, dtype), _network(dtype).state_dict()
        _train(network)
        eject(network, _base_weights(dtype))
        after = network.state_dict()
        assert after.keys() == base.keys(), "eject must leave no tensor behind"
        changed = [name for name in base if not torch.equal(after[name], base[name])]
        assert not changed, f"eject must restore the base bit for bit; {changed} differ"


def _check_copies(factory: Factory) -> None:
    network, x = _equipped(factory), _inputs()
    _train(network)
    wanted = network(x)
    for how, twin in (("deepcopy", copy.deepcopy(network)), ("pickle", pickle.loads(pickle.dumps(network)))):
        assert torch.equal(twin(x), wanted), f"a {how} must give the same outputs"
        _train(twin)
        assert not torch.equal(twin(x), wanted), f"a {how} must go on training"
        assert torch.equal(network(x), wanted), f"training a {how} must not move the original"


def _check_state_dict(factory: Factory) -> None:
    network, twin, x = _equipped(factory), _network(), _inputs()
    _train(network)
    inject(twin, factory, ".*")
    twin.eval()
    _train(twin, steps=1)  # state that loading must replace
    file = io.BytesIO()
    state = network.state_dict()
    torch.save({key: value for key, value in state.items() if ".expert." in key or _is_trained(network, key)}, file)
    file.seek(0)
    unexpected = twin.load_state_dict(torch.load(file, weights_only=True), strict=False).unexpected_keys
    assert not unexpected, f"{unexpected} of the state have nowhere to go"
    assert torch.equal(twin(x), network(x)), "trained tensors and buffers, saved and loaded, must give the same outputs"


def _is_trained(network: nn.Module, name: str) -> bool:
    return dict(network.named_parameters())[name].requires_grad if name in dict(network.named_parameters()) else False


def _check_gradient_checkpointing(factory: Factory) -> None:
    plain, recomputed = _equipped(factory), _equipped(factory)
    recomputed.load_state_dict(plain.state_dict())
    losses = _train(plain), _train(recomputed, forward=lambda x: checkpoint(recomputed, x, use_reentrant=False))
    assert losses[0] == losses[1], f"gradient checkpointing must not change the losses: {losses[0]} and {losses[1]}"


def _check_compile(factory: Factory) -> None:
    plain, compiled = _equipped(factory), _equipped(factory)
    compiled.load_state_dict(plain.state_dict())
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own inner workings while it compiles
        losses = _train(plain), _train(compiled, forward=torch.compile(compiled))
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert gap < 1e-4, f"torch.compile must not change the losses: {losses[0]} and {losses[1]}"
    assert len(list(expert_layers(compiled))) == 2, "torch.compile must keep the experts in place"
