"""Check expert types, built-in or your own: `check_expert(lambda weight: MyExpert(weight))`, `check_plan(MyPlan())`."""

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modular_experts.experts.expert import Expert
from modular_experts.experts.site import LayerPlan
from modular_experts.injection import (
    eject,
    expert_layers,
    expert_state,
    inject,
    load_expert_state,
    named_experts,
    task_vector,
)
from modular_experts.library.described import settings

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
    _check(_Case(partial(_two_layers, moves_bias), partial(inject, experts=factory, modules=".*")), compile)


def check_plan(plan: LayerPlan, compile: bool = True) -> None:
    """Check that the experts of a plan keep the contract of their types, all together.

    The promises are as in `check_expert`. The model has two transformer blocks with the names of a Llama: `layers.0`
    with `input_layernorm`, `self_attn.q_proj`, `k_proj`, `v_proj`, `o_proj`, `mlp.up_proj` and `mlp.down_proj`.

    Args:
        plan: The plan; a plan made with its `settings` must give the same experts.
        compile: Also check under `torch.compile`, which needs a C++ compiler and some seconds.

    Raises:
        AssertionError: A promise is broken; the message names it.
    """
    own = settings(plan)
    promise = "the settings of a plan must be plain values that make an equal one"
    try:
        again = type(plan)(**json.loads(json.dumps(own)))
    except TypeError as error:
        raise AssertionError(f"{promise}: {error}") from error
    assert settings(again) == own, promise
    _check(_Case(_TwoBlocks, partial(inject, experts=plan)), compile)


def _check(case: "_Case", compile: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for check in (_check_identity_at_start, _check_gradients, _check_export_reproduces, _check_eject):
            check(case, dtype)
    for check_one in (_check_state, _check_extra_loss, _check_copies, _check_state_dict, _check_gradient_checkpointing):
        check_one(case)
    if compile:
        _check_compile(case)


def _two_layers(moves_bias: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(24, 36), nn.Tanh(), nn.Linear(36, 20, bias=moves_bias))


class _TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(_Block(), _Block())
        self.head = nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(24)
        self.self_attn = _Attention()
        self.mlp = _MLP()

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return hidden_states + self.mlp(hidden_states)


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(24, 36)
        self.down_proj = nn.Linear(36, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.up_proj(x)))


class _Attention(nn.Module):
    head_dim = 12

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        heads = [layer(hidden_states).unflatten(-1, (2, 12)).transpose(-3, -2) for layer in layers]
        return self.o_proj(F.scaled_dot_product_attention(*heads).transpose(-3, -2).flatten(-2))


@dataclass(frozen=True)
class _Case:
    """Makes the network, and puts the experts under test into it."""

    build: Callable[[], nn.Module]
    equip: Callable[[nn.Module], object]

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the network without experts, always the same."""
        torch.manual_seed(0)
        return self.build().to(dtype)

    def equipped(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        network = self.plain(dtype)
        self.equip(network)
        return network.eval()

    def base(self, dtype: torch.dtype) -> Callable[[str], Tensor]:
        return self.plain(dtype).state_dict().__getitem__


def _inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def _train(network: nn.Module, steps: int = 3, forward: Callable[[Tensor], Tensor] | None = None) -> list[float]:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    # The dtype of a bias, because a full expert trains the weight in float32.
    x = _inputs(next(tensor.dtype for name, tensor in network.named_parameters() if name in ("0.bias", "head.bias")))
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
    moved = next(expert_layers(network))[1].expert.bias_delta(layer.bias, layer.weight)
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
    network = case.equipped(dtype)
    plain = case.plain(dtype)
    x = _inputs(dtype)
    losses = _train(network, steps=5)
    assert losses[-1] < losses[0], f"five steps must lower the loss, but it went from {losses[0]} to {losses[-1]}"
    if not all(expert.mergeable for _, expert in named_experts(network)):
        return
    with torch.no_grad():
        for name, delta in task_vector(network, case.base(dtype)):
            assert delta.shape == plain.get_parameter(name).shape, f"the delta of {name} must have the weight's shape"
            assert delta.dtype == torch.float32, "an exported delta must be float32"
            delta.add_to(plain.get_parameter(name))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    gap = (network(x).float() - plain(x).float()).abs().max()
    assert gap <= tolerance, f"base plus exported delta must give the trained outputs in {dtype}; gap {gap:.1e}"


def _check_state(case: _Case) -> None:
    """Check that a state gives the trained outputs, and that a type that is not mergeable has one and says why."""
    network = case.equipped()
    twin = case.equipped()
    x = _inputs()
    _train(network)
    state = {name: tensor.clone() for name, tensor in expert_state(network).items()}
    exported = {name for name, _ in task_vector(network, case.base(torch.float32))}
    for name, expert in named_experts(network):
        if expert.mergeable:
            continue
        assert expert.not_mergeable_because, "a type that is not mergeable must say why"
        assert name not in exported, "a type that is not mergeable must not export deltas"
        assert state, "a type that is not mergeable must have a state"
        if isinstance(expert, Expert):
            weight = network.get_parameter(name)
            try:
                expert.delta(weight, weight.detach)
            except NotImplementedError:
                continue
            raise AssertionError("the delta of a type that is not mergeable must raise NotImplementedError")
    if state:
        _train(twin, steps=1)  # what loading must replace
        load_expert_state(twin, state)
        assert torch.equal(twin(x), network(x)), "a loaded state must give the same outputs"


def _check_extra_loss(case: _Case) -> None:
    network = case.equipped()
    _train(network)
    for _, expert in named_experts(network):
        for name, added in expert.extra_loss().items():
            assert added.shape == (), f"the term {name} must be one number, not of shape {tuple(added.shape)}"
            assert added.isfinite(), f"the term {name} must be finite"
            assert added.requires_grad, f"the term {name} must have a gradient"


def _check_eject(case: _Case, dtype: torch.dtype) -> None:
    network = case.equipped(dtype)
    base = case.plain(dtype).state_dict()
    _train(network)
    eject(network, case.base(dtype))
    after = network.state_dict()
    assert after.keys() == base.keys(), "eject must leave no tensor behind"
    changed = [name for name in base if not torch.equal(after[name], base[name])]
    assert not changed, f"eject must restore the base bit for bit; {changed} differ"


def _check_copies(case: _Case) -> None:
    network = case.equipped()
    x = _inputs()
    _train(network)
    wanted = network(x)
    for how, twin in (("deepcopy", copy.deepcopy(network)), ("pickle", pickle.loads(pickle.dumps(network)))):
        assert torch.equal(twin(x), wanted), f"a {how} must give the same outputs"
        _train(twin)
        assert not torch.equal(twin(x), wanted), f"a {how} must go on training"
        assert torch.equal(network(x), wanted), f"training a {how} must not move the original"


def _check_state_dict(case: _Case) -> None:
    network = case.equipped()
    twin = case.equipped()
    x = _inputs()
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
    plain = case.equipped()
    recomputed = case.equipped()
    recomputed.load_state_dict(plain.state_dict())
    losses = _train(plain), _train(recomputed, forward=lambda x: checkpoint(recomputed, x, use_reentrant=False))
    assert losses[0] == losses[1], f"gradient checkpointing must not change the losses: {losses[0]} and {losses[1]}"


def _check_compile(case: _Case) -> None:
    plain = case.equipped()
    compiled = case.equipped()
    compiled.load_state_dict(plain.state_dict())
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own inner workings while it compiles
        losses = _train(plain), _train(compiled, forward=torch.compile(compiled))
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert gap < 1e-4, f"torch.compile must not change the losses: {losses[0]} and {losses[1]}"
    assert len(named_experts(compiled)) == len(named_experts(plain)), "torch.compile must keep the experts in place"
