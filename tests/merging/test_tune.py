"""Tuning tries settings and finds the best scale by a line search."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from testbed.searching import NAMES, descent, objective_on, random_experts, same_bits, state, stored

from modular_experts.deltas import Delta, Dense
from modular_experts.library import StoredExpert
from modular_experts.merging.merged import Merged, merge
from modular_experts.merging.tune import MOST_SCALES, SCALES, line_search, tune
from modular_experts.methods import TIES, Average, MergeMethod, SparseAverage, TaskArithmetic


@pytest.fixture(scope="module")
def objective(tiny_llama_dir, task_files):
    return objective_on(tiny_llama_dir, task_files, sharpness=20)


@pytest.fixture(scope="module")
def too_large(objective) -> dict[str, Delta]:
    """An expert that goes twice as far down the gradient as is best."""
    lengths = [0.05 * 1.05**power for power in range(100)]
    delta = descent(objective, "upper", 1.0)
    best = min(lengths, key=lambda length: sum(objective.losses_with(delta, length).values()))
    assert lengths[0] < best < lengths[-1]
    return {name: value * (2 * best) for name, value in delta.items()}


@pytest.fixture(scope="module")
def experts(objective, tmp_path_factory) -> list[StoredExpert]:
    """An expert of each form."""
    return stored(tmp_path_factory.mktemp("experts"), random_experts(objective))


def test_the_scale_of_an_expert_twice_too_large_is_a_half(objective, too_large, tmp_path) -> None:
    scan = [10 ** (place / 100) for place in (*range(-100, 61, 10), *range(-42, -18, 2))]
    losses = {scale: sum(objective.losses_with(too_large, scale).values()) / 2 for scale in scan}
    best = min(losses, key=losses.__getitem__)
    assert best == pytest.approx(0.5, rel=0.05)
    before = state(objective.model)
    tuned = tune(stored(tmp_path, [too_large]), TaskArithmetic(scale=7.0), objective)
    assert same_bits(objective.model, before)
    assert tuned.method == TaskArithmetic(scale=tuned.best.settings["scale"])
    assert abs(math.log10(tuned.method.scale / best)) <= 1 / 40
    assert tuned.best.loss == pytest.approx(losses[best], rel=1e-3)
    assert tuned.best.loss < sum(tuned.base.values()) / 2
    assert tuned.best.loss == min(trial.loss for trial in tuned.trials)


def test_exponents_are_tried_where_a_method_has_one_and_the_best_trial_is_what_is_stored(
    objective, experts, tmp_path
) -> None:
    tuned = tune(experts, SparseAverage(count="supports"), objective)
    tried = {trial.settings["exponent"] for trial in tuned.trials}
    assert tried == {0.0, 0.25, 0.5, 0.75, 1.0}
    best = min(tuned.trials, key=lambda trial: sum(trial.losses.values()))
    assert tuned.method == SparseAverage(count="supports", **best.settings)
    merged = merge([expert.path for expert in experts], tuned.method, tmp_path / "merged")
    assert objective.losses_with(merged) == pytest.approx(tuned.best.losses, rel=1e-5)


def test_the_grid_says_what_is_tried_and_fixes_what_it_names(objective, experts) -> None:
    experts = experts[:2]
    tuned = tune(experts, TIES(), objective, grid={"keep": [0.1, 0.5], "scale": [0.5, 2.0, 0.5]})
    wanted = [{"keep": keep, "scale": scale} for keep in (0.1, 0.5) for scale in (0.5, 2.0, 0.5)]
    assert [trial.settings for trial in tuned.trials] == wanted
    fixed = tune(experts, SparseAverage(), objective, grid={"exponent": [0.3], "scale": [1]})
    assert [trial.settings for trial in fixed.trials] == [{"exponent": 0.3, "scale": 1}]
    losses = objective.losses_with(Merged(experts, SparseAverage(exponent=0.3)))
    assert fixed.best.losses == pytest.approx(losses, rel=1e-6)


def test_settings_that_only_give_losses_that_are_no_number_are_refused(objective, experts, monkeypatch) -> None:
    monkeypatch.setattr(objective, "losses_with", lambda deltas, scale=1.0: {"upper": math.nan, "reverse": 1.0})
    with pytest.raises(ValueError, match="none of the 2 settings tried gives a finite loss"):
        tune(experts[:1], Average(), objective, grid={"scale": [1.0, 2.0]})


def test_of_equal_trials_the_earliest_wins(objective, tmp_path) -> None:
    nothing = {NAMES[0]: Dense(torch.zeros_like(objective.model.get_parameter(NAMES[0])))}
    tuned = tune(stored(tmp_path, [nothing]), SparseAverage(), objective)
    assert tuned.best is tuned.trials[0]
    assert tuned.best.settings == {"exponent": 0.0, "scale": 1.0}


@dataclass(frozen=True)
class Bare(MergeMethod):
    """Nothing to set."""

    _hidden: int = 0

    def merge(self, deltas):
        return deltas[0]


class Plain(MergeMethod):
    """No dataclass."""

    def merge(self, deltas):
        return deltas[0]


@pytest.mark.parametrize(
    ("method", "grid", "sentence"),
    [
        (TIES(), {"kep": [0.1]}, r"TIES has no setting 'kep' to tune; did you mean keep\?"),
        (TIES(), {"_cuts": [1]}, r"TIES has no setting '_cuts' to tune"),
        (TIES(), {"keep": []}, r"gives keep as \[\]; give a list of values"),
        (TIES(), {"scope": "weight"}, r"gives scope as 'weight'; give a list of values"),
        (TIES(), {"keep": 0.1}, r"gives keep as 0.1; give a list of values"),
        (TIES(), {"keep": [2.0]}, r"keep is the share of entries kept and must be in \(0, 1\], got 2.0"),
        (TIES(), {"scale": [math.inf]}, r"scale must be a finite number, got inf"),
        (Bare(), {"_hidden": [1]}, r"Bare has no setting '_hidden' to tune; name one of"),
        (TIES(), {"preset": ["mergekit"]}, r"TIES has no setting 'preset' to tune"),
        (Bare(), {}, r"Bare has neither a scale nor an exponent; give values to try in the grid"),
        (Plain(), {}, r"Plain cannot be tuned because it is not a dataclass"),
    ],
)
def test_what_cannot_be_tuned_gets_a_sentence_before_anything_is_measured(method, grid, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        tune([], method, SimpleNamespace(), grid=grid)  # type: ignore[arg-type]


def searched(loss) -> dict[float, float]:
    """Return the loss at every scale that was tried, in order."""
    losses: dict[float, float] = {}
    for scale in line_search(losses):
        assert scale not in losses
        losses[scale] = loss(scale)
    return losses


@pytest.mark.parametrize("best", [0.1, 0.13, 0.5, 0.97, 1.0, 1.3, 2.2, 3.9])
def test_one_valley_is_found_to_six_per_cent(best) -> None:
    for shape in (lambda x: x**2, abs, lambda x: x**2 if x < 0 else 9 * x, lambda x: math.expm1(x**2)):
        found = searched(lambda scale, shape=shape: shape(math.log(scale / best)))
        assert len(found) <= MOST_SCALES
        chosen = min(found, key=found.__getitem__)
        assert chosen == min(SCALES, key=lambda scale, shape=shape: shape(math.log(scale / best)))
        assert abs(math.log10(chosen / best)) <= 1 / 40 + 1e-3


def test_the_deeper_of_two_valleys_is_found() -> None:
    found = searched(lambda scale: min((math.log(scale / 0.2)) ** 2 - 0.5, (math.log(scale / 2.5)) ** 2))
    assert min(found, key=found.__getitem__) == pytest.approx(0.2, rel=0.06)


def test_a_function_that_only_falls_or_is_flat_ends_at_an_end_or_at_one() -> None:
    falling, flat = searched(lambda scale: -scale), searched(lambda scale: 0.0)
    assert min(falling, key=falling.__getitem__) == SCALES[-1] == 3.981
    assert min(flat, key=flat.__getitem__) == next(iter(flat)) == 1.0
    assert (SCALES[0], SCALES[48], len(SCALES)) == (0.1, 1.585, 65)
