"""Tiny random mixture-of-experts bases, for tests."""

import conftest
import torch
import transformers

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
