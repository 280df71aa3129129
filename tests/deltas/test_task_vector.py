"""Task vectors are vectors: sums, differences and multiples are lazy, and equal to the sums of each weight's deltas."""

import pytest
import torch
from testbed.random_deltas import Held, random_delta


def test_arithmetic_is_lazy_and_weight_by_weight() -> None:
    one = Held({"a": random_delta("Sparse", (4, 5), 1), "b": random_delta("LowRank", (4, 5), 2)})
    two = Held({"b": random_delta("Dense", (4, 5), 3), "c": random_delta("BlockSparse", (4, 5), 4)})
    found = 0.5 * one - two * 2 + -one
    assert list(found) == ["a", "b", "c"]
    assert found.shapes()["c"] == (4, 5)
    assert "a" in found
    assert one.asked == two.asked == 0
    torch.testing.assert_close(found["a"].dense(), -0.5 * one["a"].dense())
    torch.testing.assert_close(found["b"].dense(), -0.5 * one["b"].dense() - 2 * two["b"].dense())
    torch.testing.assert_close(found["c"].dense(), -2 * two["c"].dense())


def test_a_weight_of_two_shapes_is_refused_at_once() -> None:
    one, two = (Held({"a": random_delta("Dense", shape, 1)}) for shape in ((2, 3), (3, 2)))
    with pytest.raises(ValueError, match=r"disagree on the shape of a: \(2, 3\) and \(3, 2\)"):
        one + two


def test_a_model_gets_a_task_vector_and_loses_it_bit_for_bit() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vector = Held({"0.weight": random_delta("Sparse", (4, 5), 1), "1.bias": random_delta("Dense", (3,), 2)})
    handle = vector.apply_to(model, scale=3.0)
    for name in vector:
        torch.testing.assert_close(model.get_parameter(name).detach(), before[name] + 3 * vector[name].dense().float())
    handle.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), vector.apply_to(model):
        1 / 0  # noqa: B018
    with pytest.raises(ValueError, match="has no such weight"):
        Held({"x": random_delta("Dense", (3,), 2)}).apply_to(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
