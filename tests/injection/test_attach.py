"""A trained mixture that comes back from a library, and what is refused."""

import pytest
import torch
from conftest import build_model

from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.injection import expert_layers, inject
from modular_experts.injection.attach import attached
from modular_experts.injection.save import save_expert
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.systems.goat import GOATExpert
from modular_experts.systems.hilo import HiLo
from modular_experts.systems.molora import MoLoRAExpert

MADE = {
    "molora": (lambda weight: MoLoRAExpert(weight, experts=3, rank=2, k=2, alpha=5.0), "q_proj"),
    "goat": (lambda weight: GOATExpert(weight, experts=3, rank=2, rho=3.0, scaling="theory", ratio=1e-3), "q_proj"),
    "hilo": (HiLo("q_proj", experts=[1, 3], ranks=[1, 4], k=2), None),
}


@pytest.mark.parametrize("name", MADE)
def test_a_trained_mixture_comes_back_from_the_library(name, tiny_llama_dir, tmp_path):
    model, ids = Base.open(tiny_llama_dir).load(), torch.arange(5, 25)[None]
    inject(model, *[part for part in MADE[name] if part is not None])
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in expert_layers(model):
            for parameter in layer.expert.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=made))
    save_expert(model, tmp_path / "library" / name, base=tiny_llama_dir)
    fresh = Base.open(tiny_llama_dir).load()
    before = fresh(ids).logits
    with attached(fresh, tmp_path / "library" / name), torch.no_grad():
        assert torch.equal(fresh(ids).logits, model.eval()(ids).logits)
    assert torch.equal(fresh(ids).logits, before)
    assert (before - model(ids).logits).abs().max() > 1e-3


def test_a_state_of_a_class_that_is_not_built_in_is_refused(tiny_llama_dir, tmp_path):
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    record = make_record("Mine", base, not_mergeable_because="it looks at the input")
    write_expert(tmp_path / "library/mine", {}, record, state={"w/x": torch.ones(2)})
    sentence = "mine cannot be added to its base, because it looks at the input, and its record names neither a plan"
    with pytest.raises(ValueError, match=sentence):
        attached(build_model("llama"), open_expert(tmp_path / "library/mine"))
