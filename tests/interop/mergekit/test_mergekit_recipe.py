import pytest

from modular_experts.interop.mergekit.parameters import METHODS
from modular_experts.interop.mergekit.reading import read_configuration
from modular_experts.interop.mergekit.recipe import Recipe
from modular_experts.methods import TIES, Average, TaskArithmetic

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def step(tmp_path):
    def of(recipe, entries=100):
        file = tmp_path / "recipe.yaml"
        file.write_text("base_model: base\nmodels: [{model: a}, {model: b}]\n" + recipe)
        return Recipe(read_configuration(file), [NAME]).step(NAME, entries)

    return of


def test_counts_are_mergekits_also_where_a_product_of_floats_falls_short(step):
    assert 0.29 * 100 < 29
    kept = step("merge_method: ties\nparameters: {weight: 1, density: 0.29}").method
    assert kept.keep == [28 / 100] * 2
    band = step("merge_method: breadcrumbs\nparameters: {weight: 1, density: 0.29, gamma: 0.29}").method
    assert band.gamma == [28 / 100] * 2
    assert band.beta == [44 / 100] * 2


def test_density_of_less_than_one_entry_keeps_one(step):
    assert step("merge_method: ties\nparameters: {weight: 1, density: 0.001}").method.keep == [1 / 100] * 2


def test_weights_that_cancel_are_not_divided_by(step):
    cancel = "parameters: {normalize: true, weight: [1.0e-9]}"
    assert isinstance(step(f"merge_method: task_arithmetic\n{cancel}").method, TaskArithmetic)
    assert not step(f"merge_method: dare_linear\n{cancel}").method.normalise
    assert isinstance(step(f"merge_method: task_arithmetic\n{cancel}".replace("e-9", "e-3")).method, Average)


def test_ties_is_told_everything_that_mergekit_means_by_it(step):
    method = step("merge_method: ties\nparameters: {weight: 0.5, lambda: 3, rescale: true}").method
    assert isinstance(method, TIES)
    assert (method.scope, method.vote, method.divisor, method.zero) == ("weight", "weighted", "weights", "positive")
    assert (method.keep, method.weights, method.scale, method.rescale) == ([1.0, 1.0], [0.5, 0.5], 3, "l1")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.models != 1])
def test_every_method_runs_on_its_defaults(step, name):
    merge = step(f"merge_method: {name}\n" + ("parameters: {weight: 1}" if "weight" in METHODS[name].each else ""))
    on_models = name in ("linear", "karcher")
    assert [str(model) for model in merge.models] == (["a", "b", "base"] if on_models else ["a", "b"])
