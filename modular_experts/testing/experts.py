"""Check expert types, built-in or your own: `check_expert(lambda weight: MyExpert(weight))`.

Each check builds a small model with two linear layers, so that a whole battery takes seconds. A check that fails
raises an `AssertionError` that names the broken promise.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modular_experts.experts.expert import Expert
from modular_experts.injection import eject, expert_layers, expert_state, inject, load_expert_state, task_vector

Factory = Callable[[Tensor], Expert]


def check_expert(factory: Factory, compile: bool = True) -> None:
    """Check that an expert type keeps the contract of `Expert`.

    The weight must be the base before training, and the base again after `eject`, bit for bit. The exported deltas of
    weight and bias must reproduce the trained outputs, and so must a state. Copies, state dicts, gradient checkpointing
    and `torch.compile` must not change what is trained.

    Args:
        factory: Makes an expert for a weight `(out, in)`, as the argument `expert` of `ExpertModule` does.
        compile: Also check under `torch.compile`, which needs a C++ compiler and some seconds.

    Raises:
        AssertionError: The type breaks a promise; the message names it.
    """
    moves_bias = _check_bias(factory)
    case = _Case(factory, moves_bias)
    for dtype in (torch.float32, torch.bfloat16):
        _check_identity_at_start(case, dtype)
        _check_gradients(case, dtype)
        _check_export_reproduces(case, dtype)
    _check_state(case)
    _check_penalty(case)
    _check_eject(case)
    _check_copies(case)
    _check_state_dict(case)
    _check_gradient_checkpointing(case)
    if compile:
        _check_compile(case)


@dataclass(frozen=True)
class _Case:
    """The type under test, and whether it moves biases, so that every layer must have one."""

    factory: Factory
    moves_bias: bool

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """Return the network without experts, always the same: a width that no tile divides, and a bias at first."""
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 36), nn.Tanh(), nn.Linear(36, 20, bias=self.moves_bias)).to(dtype)

    def equipped(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        network = self.plain(dtype)
        inject(network, self.factory, ".*")
        return network.eval()

    def base(self, dtype: torch.dtype) -> Callable[[str], Tensor]:
        """Return the function from the name of a weight to its value before training."""
        return self.plain(dtype).state_dict().__getitem__


def _inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def _train(network: nn.Module, steps: int = 3, forward: Callable[[Tensor], Tensor] | None = None) -> list[float]:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    x = _inputs(network.get_parameter("0.bias").dtype)
    losses = []
    for _ in range(steps):
        outputs = network(x) if forward is None else forward(x)
        loss = F.mse_loss(outputs.float(), torch.ones(2, 3, 20))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _check_bias(factory: Factory) -> bool:
    """Return whether the type moves biases; then a layer without one must be refused."""
    layer = nn.Linear(24, 36)
    network = nn.Sequential(layer)
    inject(network, factory, "0")
    moved = _expert(network).bias_delta(layer.bias, lambda: layer.bias)
    if moved is None:
        return False
    assert moved.shape == layer.bias.shape, f"the delta of the bias must have its shape, not {tuple(moved.shape)}"
    try:
        inject(nn.Sequential(nn.Linear(24, 36, bias=False)), factory, "0")
    except ValueError:
        return True
    raise AssertionError("bias_delta must not depend on whether the layer has a bias, so that one without is refused")


def _check_identity_at_start(case: _Case, dtype: torch.dtype) -> None:
    x = _inputs(dtype)
    gap = (case.equipped(dtype)(x).float() - case.plain(dtype)(x).float()).abs().max()
    # The outputs lie below one, so that one rounding moves them by no more than this.
    assert gap <= torch.finfo(dtype).eps, (
        f"before training, an expert must leave the {dtype} model as it is; it moves by {gap:.1e}"
    )


def _check_gradients(case: _Case, dtype: torch.dtype) -> None:
    network = case.equipped(dtype)
    _train(network, steps=1)  # types that start one factor at zero give the other no gradient before the first step
    x = _inputs(dtype).requires_grad_()
    network(x).float().square().sum().backward()
    assert x.grad is not None, "the gradient must reach the layer's input"
    assert bool(x.grad.any()), "the gradient of the layer's input must not be zero"
    assert any(parameter.requires_grad for parameter in network.parameters()), "an expert must train something"
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, f"{name} is frozen but has a gradient"
            continue
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert bool(parameter.grad.any()), f"the gradient of {name} is zero"
        assert parameter.dtype == torch.float32, f"{name} is trained in {parameter.dtype}; small steps need float32"


def _check_export_reproduces(case: _Case, dtype: torch.dtype) -> None:
    network, plain, x = case.equipped(dtype), case.plain(dtype), _inputs(dtype)
    losses = _train(network, steps=5)
    assert losses[-1] < losses[0], f"five steps must lower the loss, but it went from {losses[0]} to {losses[-1]}"
    if not _expert(network).mergeable:
        return
    with torch.no_grad():
        for name, delta in task_vector(network, case.base(dtype)):
            assert delta.shape == plain.get_parameter(name).shape, f"the delta of {name} must have the weight's shape"
            assert delta.dtype == torch.float32, "an exported delta must be float32"
            delta.add_to(plain.get_parameter(name))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    gap = (network(x).float() - plain(x).float()).abs().max()
    assert gap <= tolerance, f"base plus exported delta must give the trained outputs in {dtype}; gap {gap:.1e}"


def _expert(network: nn.Module) -> Expert:
    return next(expert_layers(network))[1].expert


def _check_state(case: _Case) -> None:
    """Check that a state gives the trained outputs, and that a type that is not mergeable has one and says why."""
    network, twin, x = case.equipped(), case.equipped(), _inputs()
    _train(network)
    state = {name: tensor.clone() for name, tensor in expert_state(network).items()}
    if not _expert(network).mergeable:
        assert _expert(network).not_mergeable_because, "a type that is not mergeable must say why"
        assert not list(task_vector(network)), "a type that is not mergeable must not export deltas"
        assert state, "a type that is not mergeable must have a state"
        weight = network.get_parameter("0.weight")
        try:
            _expert(network).delta(weight, lambda: weight)
        except NotImplementedError:
            pass
        else:
            raise AssertionError("the delta of a type that is not mergeable must raise NotImplementedError")
    if state:
        _train(twin, steps=1)  # what loading must replace
        load_expert_state(twin, state)
        assert torch.equal(twin(x), network(x)), "a loaded state must give the same outputs"


def _check_penalty(case: _Case) -> None:
    network = case.equipped()
    _train(network)
    added = _expert(network).penalty()
    if added is not None:
        assert added.shape == (), f"a penalty must be one number, not of shape {tuple(added.shape)}"
        assert added.isfinite(), "a penalty must be finite"
        assert added.requires_grad, "a penalty must have a gradient"


def _check_eject(case: _Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        network, base = case.equipped(dtype), case.plain(dtype).state_dict()
        _train(network)
        eject(network, case.base(dtype))
        after = network.state_dict()
        assert after.keys() == base.keys(), "eject must leave no tensor behind"
        changed = [name for name in base if not torch.equal(after[name], base[name])]
        assert not changed, f"eject must restore the base bit for bit; {changed} differ"


def _check_copies(case: _Case) -> None:
    network, x = case.equipped(), _inputs()
    _train(network)
    wanted = network(x)
    for how, twin in (("deepcopy", copy.deepcopy(network)), ("pickle", pickle.loads(pickle.dumps(network)))):
        assert torch.equal(twin(x), wanted), f"a {how} must give the same outputs"
        _train(twin)
        assert not torch.equal(twin(x), wanted), f"a {how} must go on training"
        assert torch.equal(network(x), wanted), f"training a {how} must not move the original"


def _check_state_dict(case: _Case) -> None:
    network, twin, x = case.equipped(), case.equipped(), _inputs()
    _train(network)
    _train(twin, steps=1)  # state that loading must replace
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    file = io.BytesIO()
    state = network.state_dict()
    torch.save({key: value for key, value in state.items() if ".expert." in key or key in trained}, file)
    file.seek(0)
    unexpected = twin.load_state_dict(torch.load(file, weights_only=True), strict=False).unexpected_keys
    assert not unexpected, f"{unexpected} of the state have nowhere to go"
    assert torch.equal(twin(x), network(x)), "trained tensors and buffers, saved and loaded, must give the same outputs"


def _check_gradient_checkpointing(case: _Case) -> None:
    plain, recomputed = case.equipped(), case.equipped()
    recomputed.load_state_dict(plain.state_dict())
    losses = _train(plain), _train(recomputed, forward=lambda x: checkpoint(recomputed, x, use_reentrant=False))
    assert losses[0] == losses[1], f"gradient checkpointing must not change the losses: {losses[0]} and {losses[1]}"


def _check_compile(case: _Case) -> None:
    plain, compiled = case.equipped(), case.equipped()
    compiled.load_state_dict(plain.state_dict())
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own inner workings while it compiles
        losses = _train(plain), _train(compiled, forward=torch.compile(compiled))
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert gap < 1e-4, f"torch.compile must not change the losses: {losses[0]} and {losses[1]}"
    assert len(list(expert_layers(compiled))) == 2, "torch.compile must keep the experts in place"
