"""A choice within a training step: the step's own dense gradient chooses, and the chosen units' gradient trains."""

from collections.abc import Callable
from functools import partial
from typing import Any

import conftest
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from testbed import runs
from testbed.kept_tiles import kept_tiles
from testbed.pairwise import pairwise
from torch.utils.checkpoint import checkpoint

from modular_experts.experts import MaskedExpert, SparseExpert
from modular_experts.injection import expert_layers, inject
from modular_experts.masks import SNIP, FisherInformation, GrowAndDrop, RandomScore, Reselect, SelectOnce, top_k
from modular_experts.selection.choice import SupportChoice, selectable_layers
from modular_experts.selection.from_step import StepChoice
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.selection.scoring import ScoringPass

SPARSE = partial(SparseExpert, keep_ratio=0.1)
KINDS = {
    "element": SPARSE,
    "block": partial(SparseExpert, keep_ratio=0.3, granularity="block", block_size=5),  # it divides no side
    "column": partial(SparseExpert, keep_ratio=0.2, granularity="column"),
}


class Look(Callback):
    """Keeps, for each optimizer step, its batches, the weights before it, and supports and gradients at its end."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.before: list[dict[str, torch.Tensor]] = []
        self.after: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if len(self.batches) == trainer.global_step:
            self.batches.append([])
            self.before.append({name: layer.matrix.clone() for name, layer in expert_layers(pl_module.model)})
        self.batches[-1].append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        layers = {name: layer.expert for name, layer in expert_layers(pl_module.model)}
        self.after.append({n: (e.support_units().clone(), e.values.grad.clone()) for n, e in layers.items()})


@pytest.fixture
def fit(fit_tiny) -> Callable[..., tuple[Any, Look]]:
    """Train in float64 with a schedule; return the module and what was seen, with the trainer."""

    def train(kind, schedule, *callbacks, own=None, **settings):
        look = Look()
        settings |= {"own": {"dtype": "float64"} | (own or {}), "data": {"packing": False}}
        trained, look.trainer, _ = fit_tiny(kind, schedule, look, *callbacks, **settings)
        return trained, look

    return train


def _dense(base, look: Look, step: int, turn: bool = False) -> list[dict[str, torch.Tensor]]:
    """Return each micro-batch's gradient of the mean loss of a token, of a dense model with the weights of a step.

    With `turn`, the base stores its weights as (in, out).
    """
    model = runs.module(base, None, dtype="float64")
    model.configure_model()
    weights = {name: model.model.get_parameter(name).requires_grad_(True) for name in look.before[step]}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(look.before[step][name].T if turn else look.before[step][name])
    found = []
    for batch in look.batches[step]:
        logits = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(weights.values()))
        found.append({name: one.T if turn else one for name, one in zip(weights, gradients, strict=True)})
    return found


def test_the_first_choice_is_that_of_a_scoring_pass_over_the_training_batch(fit, tiny_llama_dir, tmp_path):
    """Bit for bit, in float32, and so is the gradient that the kept entries get."""
    schedule = MaskSchedule(rule=SelectOnce(), batches="step")
    _, look = fit(SPARSE, schedule, own={"dtype": "float32"}, max_steps=2)
    fresh = runs.module(tiny_llama_dir, SPARSE)
    fresh.configure_model()
    fresh.model.train()
    fresh.trainer = runs.trainer(tmp_path)
    found: dict[str, torch.Tensor] = {}
    ScoringPass(fresh.loss, look.batches[0]).gradient(selectable_layers(fresh.model), found.__setitem__)
    assert len(found) == len(look.after[0]) == 4
    for name, (units, gradient) in look.after[0].items():
        assert torch.equal(units, top_k(found[name].abs(), units.numel()))
        assert torch.equal(gradient, found[name].view(-1)[units])
        assert torch.equal(look.after[1][name][0], units)
    assert (schedule.selections, schedule.passes) == (1, 0)
    assert schedule.seconds > 0


@pytest.mark.parametrize(
    ("kind", "part", "checkpointing"), pairwise(KINDS, [(1, 1024), (3, 1024), (3, 0)], [False, True])
)
def test_the_chosen_units_train_by_the_sum_over_micro_batches_of_the_dense_gradient(
    kind, part, checkpointing, fit, tiny_llama_dir
) -> None:
    """Weights are as before the choice; the last micro-batch chooses, or the first without memory."""
    parts, mib = part
    rule = GrowAndDrop(every=1, until=1.0, replace=0.5)
    schedule = MaskSchedule(rule=rule, batches="step", accumulator_mib=mib)
    own = {"gradient_checkpointing": checkpointing}
    module, look = fit(KINDS[kind], schedule, own=own, max_steps=2, accumulate_grad_batches=parts)
    layers = dict(expert_layers(module.model))
    moved = 0
    for step in range(2):
        gradients = _dense(tiny_llama_dir, look, step)
        assert len(gradients) == parts
        for name, (units, gradient) in look.after[step].items():
            expert = layers[name].expert
            total = sum(one[name] for one in gradients) / parts
            # The loss is float32, and so is a third of its gradient.
            torch.testing.assert_close(gradient, kept_tiles(total, expert.tile, units.tolist()), rtol=1e-6, atol=1e-9)
            ranked = expert.unit_scores((total if mib else gradients[0][name]).abs())
            if step == 0:
                assert torch.equal(units.long(), ranked.topk(units.numel()).indices.sort().values)
                continue
            before = look.after[step - 1][name][0]
            new = units[~torch.isin(units, before)]
            outside = ranked.clone()
            outside[before.long()] = -1
            assert torch.equal(new.long(), outside.topk(new.numel()).indices.sort().values)
            moved += new.numel()
    assert moved >= 6
    assert schedule.selections == 2


def test_the_gradient_that_is_clipped_is_that_of_the_new_support(fit) -> None:
    norms = []

    class Norm(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            found = [p.grad.square().sum() for group in self.param_groups for p in group["params"]]
            norms.append(float(sum(found).sqrt()))
            return loss

    schedule = MaskSchedule(rule=SelectOnce(), batches="step")
    fit(SPARSE, schedule, own={"optimizer": partial(Norm, lr=1e-3)}, max_steps=1, gradient_clip_val=1e-3)
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_newcomers_start_without_moments_and_move_in_the_step_that_chose_them(fit):
    """Adam's first step of an entry whose moments are zero is known from its gradient alone."""
    rule = GrowAndDrop(every=2, until=1.0, replace=0.5)
    schedule = MaskSchedule(rule=rule, batches="step")
    module, look = fit(SPARSE, schedule, max_steps=3)
    rate = 1e-2 * module.scheduler.factor(2, 3)
    for name, layer in expert_layers(module.model):
        units, gradient = look.after[2][name]
        new = ~torch.isin(units, look.after[1][name][0])
        mean, square = 0.1 * gradient[new] / (1 - 0.9**3), 0.001 * gradient[new].square() / (1 - 0.999**3)
        torch.testing.assert_close(layer.expert.values[new].detach(), -rate * mean / (square.sqrt() + 1e-8))
        assert new.any()


@pytest.mark.parametrize(
    ("kind", "settings", "passes"),
    [
        (SPARSE, {"score": FisherInformation()}, 0),
        (SPARSE, {"score": RandomScore()}, 0),
        (SPARSE, {"batches": 4}, 3 * 4),  # three choices over four batches
        (partial(MaskedExpert, keep_ratio=0.1), {"rule": Reselect(every=2, until=1.0)}, 4 * 2),
    ],
)
def test_what_a_step_cannot_give_takes_extra_passes(kind, settings, passes, fit_tiny) -> None:
    settings = {"rule": GrowAndDrop(every=2, until=1.0, replace=0.4), "batches": "step"} | settings
    schedule = MaskSchedule(**settings)
    fit_tiny(kind, schedule, max_steps=5)
    assert schedule.passes == passes
    assert schedule.selections == (2 if kind is not SPARSE else 3)


def test_fisher_ranks_by_the_square_of_the_steps_gradient(fit, tiny_llama_dir) -> None:
    schedule = MaskSchedule(score=FisherInformation(), rule=SelectOnce(), batches="step")
    _, look = fit(KINDS["block"], schedule, max_steps=1, accumulate_grad_batches=2)
    gradients = _dense(tiny_llama_dir, look, 0)
    layers = dict(expert_layers(look.trainer.lightning_module.model))
    for name, (units, _) in look.after[0].items():
        square = (sum(one[name] for one in gradients) / 2).square()
        wanted = layers[name].expert.unit_scores(square).topk(units.numel()).indices
        assert torch.equal(units.long(), wanted.sort().values)


class Seen(SNIP):
    """Ranks by the gradient, and keeps its norm."""

    def __init__(self) -> None:
        object.__setattr__(self, "norms", [])

    def __call__(self, weight, gradient, delta):
        self.norms.append(float(gradient.norm()))
        return gradient.abs()


@pytest.mark.parametrize("mib", [0, 1024])
def test_a_score_gets_the_mean_gradient_whatever_the_factors_of_the_loss(mib, fit, tiny_llama_dir) -> None:
    score = Seen()
    schedule = MaskSchedule(score=score, rule=SelectOnce(), batches="step", accumulator_mib=mib)
    plugins = [_scaled(torch.amp.GradScaler("cpu", init_scale=2.0**12))]
    own = {"dtype": "float32"}
    _, look = fit(SPARSE, schedule, own=own, max_steps=1, accumulate_grad_batches=2, plugins=plugins)
    gradients = _dense(tiny_llama_dir, look, 0)
    for name in look.after[0]:
        wanted = (gradients[0][name] + gradients[1][name]) / 2 if mib else gradients[0][name]
        assert any(norm == pytest.approx(float(wanted.norm()), rel=0.01) for norm in score.norms)


def _scaled(scaler: torch.amp.GradScaler) -> MixedPrecision:
    """Return half precision with a scaler, which Lightning leaves to GPUs."""
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_a_choice_waits_while_the_scaled_gradient_overflows(fit, tiny_llama_dir) -> None:
    schedule = MaskSchedule(rule=SelectOnce(), batches="step")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-9, growth_interval=1000)
    module, look = fit(SPARSE, schedule, own={"dtype": "float32"}, max_steps=4, plugins=[_scaled(scaler)])
    assert scaler.get_scale() < 2.0**30
    names = list(look.after[0])
    supports = [torch.cat([step[name][0] for name in names]) for step in look.after]
    first = next(step for step, support in enumerate(supports) if torch.equal(support, supports[-1]))
    assert first > 0
    assert schedule.selections == 1
    assert all(layer.expert.chooser is None for _, layer in expert_layers(module.model))
    gradients = _dense(tiny_llama_dir, look, first)[0]
    for name, (units, gradient) in look.after[-1].items():
        assert gradient.isfinite().all()
        best = gradients[name].abs().flatten().topk(units.numel()).indices
        assert torch.isin(units.long(), best).float().mean() > 0.9


def _small_choice(**settings: Any) -> tuple[torch.nn.Module, StepChoice]:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    inject(model, SPARSE, ".*")
    layers = selectable_layers(model)
    step = StepChoice(SupportChoice(layers, 0, (20, 20), **settings))
    step.next_part(True)
    return model, step


def test_a_layer_that_no_token_reached_waits() -> None:
    model, step = _small_choice()
    model[1](torch.randn(3, 8)).square().sum().backward()
    chosen, waiting = step.finish()
    assert list(chosen) == ["1.weight"]
    assert waiting == ["0.weight"]
    assert model[0].expert.chooser is model[1].expert.chooser is None


@pytest.mark.parametrize(("parts", "budget"), [(1, 2**30), (2, 2**30), (2, 0)], ids=["one", "summed", "beyond"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_a_pass_calls_twice_chooses_and_trains_by_the_sum(
    checkpointing: bool, parts: int, budget: int
) -> None:
    layer = torch.nn.Linear(8, 8, bias=False, dtype=torch.float64)
    model, dense = torch.nn.Sequential(layer, torch.nn.Tanh(), layer), layer.weight.detach().clone().requires_grad_()
    inject(model, SPARSE, ".*")
    step = StepChoice(SupportChoice(selectable_layers(model), 0, (20, 20), rule=SelectOnce()), parts, budget)
    ranked = torch.empty(0)
    for part in range(parts):
        step.next_part(part == parts - 1)
        x = torch.randn(3, 8, dtype=torch.float64)
        output = checkpoint(model, x, use_reentrant=False) if checkpointing else model(x)
        # A third call, which the loss does not need.
        layer(x)
        output.square().sum().backward()
        (torch.tanh(x @ dense.T) @ dense.T).square().sum().backward()
        if part == 0 or budget:
            ranked = dense.grad.flatten().abs().clone()
    units = step.finish()[0]["0.weight"].long()
    assert units.tolist() == ranked.topk(len(units)).indices.sort().values.tolist()
    torch.testing.assert_close(layer.expert.values.grad, dense.grad.view(-1)[units], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reached", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", [SPARSE, KINDS["block"]], ids=["entries", "tiles"])
def test_a_layer_that_some_micro_batches_reach_trains_by_these(kind, reached: tuple[bool, bool]) -> None:
    """As a matrix of a mixture of experts does; where the last one does not reach it, its choice waits."""
    layer = torch.nn.Linear(8, 8, bias=False, dtype=torch.float64)
    dense = layer.weight.detach().clone().requires_grad_()
    inject(torch.nn.Sequential(layer), kind, ".*")
    step = StepChoice(SupportChoice(selectable_layers(torch.nn.Sequential(layer)), 0, (20, 20)), parts=2)
    for number, is_reached in enumerate(reached):
        step.next_part(number == 1)
        x = torch.randn(3, 8, dtype=torch.float64)
        for weight in (layer, lambda x: x @ dense.T) if is_reached else ():
            weight(x).square().sum().backward()
    chosen, waiting = step.finish()
    assert waiting == ([] if reached[1] else ["0.weight"])
    units = chosen.get("0.weight", layer.expert.support_units())
    torch.testing.assert_close(
        layer.expert.values.grad, kept_tiles(dense.grad, layer.expert.tile, units.tolist()), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("share", "waits"), [(0.5, True), (1 - 6e-8, False)], ids=["some ranks", "all ranks"])
def test_a_layer_that_some_ranks_reach_waits_without_its_dense_gradient(share: float, waits: bool) -> None:
    model, step = _small_choice()
    step.reduce = lambda one: one * share
    loss = model(torch.randn(3, 8)).square().sum()
    step.agree_on_reached()
    loss.backward()
    assert [layer.expert.chooser.total for layer in model] == [None, None]
    assert bool(step.finish()[1]) == waits


def test_what_gradient_checkpointing_reaches_again_is_not_reached_in_the_next_micro_batch() -> None:
    layer = torch.nn.Linear(8, 8)
    inject(torch.nn.Sequential(layer), SPARSE, ".*")
    step = StepChoice(SupportChoice(selectable_layers(torch.nn.Sequential(layer)), 0, (20, 20)), parts=2)
    step.next_part(False)
    loss = checkpoint(layer, torch.randn(3, 8), use_reentrant=False).square().sum()
    step.agree_on_reached()
    loss.backward()
    step.next_part(True)
    told = []
    step.reduce = lambda one: told.append(one.tolist()) or one
    step.agree_on_reached()
    assert told == [[0.0]]


def test_a_score_that_changes_the_gradient_is_refused() -> None:
    model, _ = _small_choice(score=lambda weight, gradient, delta: gradient.abs_())
    with pytest.raises(ValueError, match="the score changed the gradient"):
        model(torch.randn(3, 8)).square().sum().backward()


def test_a_random_score_leaves_the_training_s_random_numbers_alone() -> None:
    model, step = _small_choice(score=lambda weight, gradient, delta: torch.rand(weight.shape) + 0 * gradient)
    output = model(torch.randn(3, 8)).square().sum()
    state = torch.get_rng_state()
    output.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(step.finish()[0]) == 2


class NoDropout(Callback):
    def on_fit_start(self, trainer, pl_module) -> None:
        for part in pl_module.model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0


def test_a_weight_that_is_stored_transposed_chooses_the_same_entries(tiny, task_files, tmp_path) -> None:
    """GPT-2 stores its weights as (in, out); the choice sees them as (out, in)."""
    how = {"own": {"modules": conftest.TARGETS["gpt2"], "dtype": "float64"}, "data": {"packing": False}, "max_steps": 1}
    schedule, look = MaskSchedule(rule=SelectOnce(), batches="step"), Look()
    runs.fit(tiny("gpt2"), task_files, tmp_path, SPARSE, schedule, look, NoDropout(), **how)
    (dense,) = _dense(tiny("gpt2"), look, 0, turn=True)
    for name, (units, gradient) in look.after[0].items():
        flat = dense[name].reshape(-1)
        assert torch.equal(units.long(), flat.abs().topk(units.numel()).indices.sort().values)
        torch.testing.assert_close(gradient, flat[units.long()], rtol=1e-8, atol=1e-12)


def test_what_was_accumulated_moves_along_with_an_exchange_between_micro_batches(fit, tiny_llama_dir):
    """An entry that stays keeps its gradient of earlier micro-batches, and a newcomer starts with the next one."""
    rule = Reselect(every=1, until=1.0, unit="micro_batches")
    schedule = runs.Watch(rule=rule)
    _, look = fit(SPARSE, schedule, max_steps=1, accumulate_grad_batches=2)
    assert schedule.selections == 2
    # No value has moved yet, so both micro-batches ran with the base's weights.
    first, second = _dense(tiny_llama_dir, look, 0)
    for name, (units, gradient) in look.after[0].items():
        stayed = torch.isin(units, torch.tensor(schedule.supports[0][name]))
        assert 0 < stayed.sum() < len(units)
        places = units.long()
        wanted = (first[name].flatten()[places] * stayed + second[name].flatten()[places]) / 2
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
