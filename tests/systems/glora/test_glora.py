"""GLoRA against the formula of the paper, LoRA and PEFT, and the paths that training draws."""

import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import build_model
from lightning.pytorch import Callback
from testbed.checkpointing import check_checkpointing
from testbed.systems import filled, five_steps
from torch import nn

from modular_experts.experts import LoRAExpert
from modular_experts.injection import expert_layers, inject, task_vector
from modular_experts.systems.glora import GLoRAExpert
from modular_experts.systems.glora.callback import RandomPaths
from modular_experts.systems.glora.expert import KINDS, GLoRAPath
from modular_experts.testing import check_callback, check_expert

ALL = {"a": "lora", "b": "lora", "c": "lora", "d": "vector", "e": "vector"}
PATHS = [GLoRAPath(*kinds) for kinds in itertools.product(*KINDS.values())]
LARGEST = GLoRAPath(**ALL)


@pytest.mark.parametrize("settings", [{}, {"c": "lora", "d": "vector", "e": "vector"}])
def test_the_type_keeps_the_contract(settings) -> None:
    torch.manual_seed(3)
    check_expert(partial(GLoRAExpert, **settings), compile=False)


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(10, 12, bias=bias, dtype=torch.float64)


assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-9)


def by_hand(expert: GLoRAExpert, path: GLoRAPath, weight, bias):
    """Return `W + W * A + B` and `b + b * D + E + W C`, each part a full matrix of its own."""

    def part(name: str, kind: str, shape: tuple[int, int]) -> torch.Tensor:
        up, down = (getattr(expert, f"{name}_{half}", None) for half in ("up", "down"))
        found = torch.zeros(shape, dtype=torch.float64)
        if kind == "lora":
            found += up @ down
        elif kind == "vector":
            found += up[:, 0][:, None]
        elif kind == "constant":
            found += up[0, 0]
        return found

    (rows, columns), kinds = weight.shape, path._asdict()
    a, b = (part(name, kinds[name], (rows, columns)) for name in "ab")
    c, d, e = (
        part(name, kinds[name], (size, 1))[:, 0] for name, size in zip("cde", (columns, rows, rows), strict=True)
    )
    return weight + weight * a + b, bias + bias * d + e + weight @ c


def test_each_of_the_432_paths_is_the_papers_formula_in_training_merged_and_cut_out() -> None:
    base, x = layer(), torch.randn(7, 10, dtype=torch.float64)
    expert = filled(GLoRAExpert(base.weight, rank=3, **ALL))
    assert math.prod(map(len, expert.choices().values())) == len(PATHS) == len(set(PATHS)) == 432
    with torch.no_grad():
        for path in PATHS:
            weight, bias = by_hand(expert, path, base.weight, base.bias)
            wanted = x @ weight.T + bias
            expert.drawn, expert.path = path, LARGEST
            assert_close(expert.train()(x, base.weight, base.bias), wanted)
            expert.drawn, expert.path = LARGEST, path
            assert_close(expert.eval()(x, base.weight, base.bias), wanted)
            assert (expert.bias_delta(base.bias, base.weight) is None) == (path[2:] == ("none",) * 3)
            # What is cut out keeps the numbers of its path alone, and its state makes it anew.
            cut = expert.only(path, base.weight)
            assert sum(parameter.numel() for parameter in cut.parameters()) == expert.numbers(path)
            again = GLoRAExpert.of_state(base.weight, cut.state())
            again.load_state_dict(cut.state())
            assert cut.path == again.path == path
            for one in (expert, cut, again):
                assert_close(base.weight + one.delta(base.weight, base.weight.detach).dense(), weight)
                moved = one.bias_delta(base.bias, base.weight)
                assert_close(base.bias if moved is None else base.bias + moved.dense(), bias)


def test_the_numbers_of_a_path_are_those_of_the_formula() -> None:
    count = GLoRAExpert(torch.zeros(12, 10), rank=3, **ALL).numbers
    assert count(LARGEST) == 3 * 22 + 3 * 22 + 3 * 11 + 12 + 12
    assert count(GLoRAPath("vector", "constant", "vector", "constant", "constant")) == 12 + 1 + 10 + 1 + 1
    assert count(GLoRAPath(*["none"] * 5)) == 0


def test_b_alone_is_a_lora_bit_for_bit() -> None:
    found = []
    for make in (partial(GLoRAExpert, rank=3, a="none"), partial(LoRAExpert, rank=3, alpha=3.0)):
        torch.manual_seed(1)
        network = nn.Sequential(layer(), nn.Tanh())
        inject(network, make, "0")
        five_steps(network, network)
        ((_, delta),) = task_vector(network)
        found.append(delta)
    assert torch.equal(found[0].up, found[1].up)
    assert torch.equal(found[0].down, found[1].down)
    assert found[0].rank == 3


def test_only_what_a_path_uses_learns_and_the_rest_has_a_gradient_of_zero() -> None:
    base, x = layer(), torch.randn(4, 10, dtype=torch.float64)
    expert = filled(GLoRAExpert(base.weight, rank=3, **ALL)).train()
    for path in (GLoRAPath("none", "vector", "none", "none", "constant"), GLoRAPath(*["none"] * 5)):
        expert.zero_grad()
        expert.drawn = path
        (expert(x, base.weight, base.bias).square().sum()).backward()
        gradients = {name: parameter.grad for name, parameter in expert.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values()), "DDP waits for each of them"
        moved = {name: int((gradient != 0).sum()) for name, gradient in gradients.items() if gradient.any()}
        assert moved == ({} if path.b == "none" else {"b_up": 12, "e_up": 1})


def test_gpt2_moves_weights_in_its_own_orientation_and_biases() -> None:
    model = build_model("gpt2").double()
    inject(model, partial(GLoRAExpert, rank=2, **ALL), r".*\.(c_attn|c_fc)")
    filled(model)
    ids = torch.arange(5, 29).view(4, 6)
    wanted, plain = model(input_ids=ids).logits, build_model("gpt2").double()
    moved = dict(task_vector(model))
    assert sum(name.endswith("bias") for name in moved) == len(moved) / 2 == 4
    with torch.no_grad():
        for name, delta in moved.items():
            delta.add_to(plain.get_parameter(name))
    assert (wanted - build_model("gpt2").double()(input_ids=ids).logits).abs().max() > 0.1
    torch.testing.assert_close(plain(input_ids=ids).logits, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_takes_the_same_path_again(architecture) -> None:
    def make() -> nn.Module:
        model = build_model(architecture, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0).double()
        biased = ALL if architecture == "gpt2" else {"a": "lora", "b": "lora"}
        inject(model, partial(GLoRAExpert, rank=2, **biased), "all-linear")
        for number, (_, one) in enumerate(expert_layers(model)):
            kinds = one.expert.choices().values()
            one.expert.drawn = GLoRAPath(*(names[(number + place) % len(names)] for place, names in enumerate(kinds)))
        return filled(model)

    ids = torch.arange(5, 29).view(4, 6)
    check_checkpointing(make, lambda model: model(input_ids=ids, labels=ids).loss, all_learn=False)


def test_the_callback_keeps_its_state_within_a_fit() -> None:
    check_callback(RandomPaths, GLoRAExpert)


class Paths(Callback):
    """Keeps the path of each layer in each micro-batch."""

    def __init__(self) -> None:
        self.drawn: list[dict] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.drawn.append({name: layer.expert.drawn for name, layer in expert_layers(pl_module.model)})


GLORA = partial(GLoRAExpert, rank=2)


def test_a_path_is_drawn_for_each_step_and_layer_and_micro_batches_share_it(fit_tiny):
    paths = Paths()
    module, _, losses = fit_tiny(GLORA, RandomPaths(seed=1), paths, accumulate_grad_batches=2, max_steps=20)
    assert len(losses) == 40
    assert paths.drawn[::2] == paths.drawn[1::2]
    # Without biases 16 paths are left: 20 steps of four layers draw each about five times.
    counted = Counter(path for drawn in paths.drawn[::2] for path in drawn.values())
    assert len(counted) == 16
    # Chi-square with 15 degrees of freedom; 37.7 is its 99.9 % quantile.
    assert sum((number - 5) ** 2 / 5 for number in counted.values()) < 37.7
    assert sum(len(set(drawn.values())) > 1 for drawn in paths.drawn) > 35
    assert all(layer.expert.drawn is None for _, layer in expert_layers(module.model)), "later training is the largest"
    again = Paths()
    fit_tiny(GLORA, RandomPaths(seed=1), again, max_steps=3)
    assert again.drawn == paths.drawn[:6:2]
    fit_tiny(GLORA, RandomPaths(seed=2), again, max_steps=3)
    assert again.drawn[3:] != again.drawn[:3]


def test_a_fit_that_fails_leaves_no_path_drawn(fit_tiny) -> None:
    class Fail(Paths):
        def on_train_batch_end(self, trainer, pl_module, *rest) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            self.layers = dict(expert_layers(pl_module.model))
            raise OSError

    failing = Fail()
    with pytest.raises(OSError):  # noqa: PT011
        fit_tiny(GLORA, RandomPaths(), failing)
    assert all(failing.drawn[0].values())
    assert all(layer.expert.drawn is None for layer in failing.layers.values())
