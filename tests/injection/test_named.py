"""Experts of a library answer by name on one model, which is the base again behind them, bit for bit."""

import pytest
import torch
from testbed.served import make_library

from modular_experts import Base, NamedExperts
from modular_experts.base.apply import applied


def test_a_model_uses_the_experts_that_are_named_and_no_others(tiny_llama_dir, tmp_path) -> None:
    make_library(tiny_llama_dir, tmp_path / "library")
    model, ids = Base.open(tiny_llama_dir).load(), torch.tensor([[5, 6, 7]])

    @torch.no_grad()
    def logits(*names: str) -> torch.Tensor:
        with applied(model, [tmp_path / "library" / name for name in names]):
            return model(ids).logits

    expected = {names: logits(*names) for names in ((), ("lora",), ("entries",), ("entries", "lora"))}
    with torch.no_grad(), NamedExperts(model, tmp_path / "library") as experts:
        for names in [*expected, ("lora",), ()]:
            experts.use(*names)
            assert (experts.names, bool(experts.used)) == (names, bool(names))
            assert torch.equal(model(ids).logits, expected[names])
        experts.use("lora")
        with pytest.raises(KeyError, match="there is no expert 'lra'; did you mean lora"):
            experts.use("lra")
        assert experts.names == ("lora",)
    assert torch.equal(logits(), expected[()])
    of_my_own = NamedExperts(model, {"mine": tmp_path / "library" / "dense"})
    of_my_own.use("mine")
    mine = model(ids).logits
    assert not torch.equal(mine, expected[()])
    again = NamedExperts(model, {"mine": tmp_path / "library" / "dense"})
    assert torch.equal(model(ids).logits, expected[()])
    again.use("mine")
    assert torch.equal(model(ids).logits, mine)
