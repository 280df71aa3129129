"""Experts of weights beyond plain linear layers: mixture-of-experts bases, subclasses of `nn.Linear`."""

from __future__ import annotations

from functools import partial

import conftest
import torch
import transformers
from torch import nn

from modular_experts.experts import LoRAExpert
from modular_experts.injection import find_sites, inject

MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "shared_expert_intermediate_size": 16,
    },
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
"""Settings of tiny bases with four experts in each block, by their model type."""


def mixture(kind: str, seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **conftest.GROUPED | MIXTURES[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_all_linear_leaves_out_gates_and_routers() -> None:
    shared = mixture("qwen2_moe")
    names = inject(shared, partial(LoRAExpert, rank=2), "all-linear")
    assert any(name.endswith("shared_expert.up_proj.weight") for name in names)
    assert not any("shared_expert_gate" in name for name in names)
    # JetMoE's router is a linear layer.
    routers = {site.name for site in find_sites(mixture("jetmoe")) if site.layer == "layer"}
    assert len(routers) == 4
    assert not any(name.endswith("router.layer.weight") for name in inject(mixture("jetmoe"), LoRAExpert, "all-linear"))
    assert len(inject(mixture("jetmoe"), partial(LoRAExpert, rank=2), "router.layer")) == 4


def test_a_subclass_takes_experts_if_its_forward_pass_is_a_linear_layers() -> None:
    config = transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    assert {name.split(".")[-2] for name in inject(model, partial(LoRAExpert, rank=2), "all-linear")} == {
        *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    }
    torch.testing.assert_close(model(ids).logits, before)

    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * input @ self.weight.T + self.bias

    assert not find_sites(nn.Sequential(Doubled(2, 3), Scaled(2, 3)))
