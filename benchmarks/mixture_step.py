"""What a training step of the matrices of a mixture-of-experts base costs, beside PEFT's `target_parameters`.

The base is a Qwen3-MoE with random weights, whose layers have 16 experts, 4 of them for each token; a batch has 4 x 128
tokens. LoRAs have rank 8, and sparse entries are as many. All take turns on one thread, in an order drawn anew for
each round; times are ratios of medians of CPU time. The bytes that autograd keeps for backward are counted by
`torch.autograd.graph.saved_tensors_hooks`, without the parameters of the model.

    python benchmarks/mixture_step.py [--repeats 7] [--json] [--quick]      2 minutes
"""

from functools import partial
from typing import Any

import peft
import torch
from contenders import Contender, Work
from measuring import Parser, output, print_machine, print_table
from quantised import measure
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from modular_experts.experts import LoRAExpert, SparseExpert
from modular_experts.injection import find_sites, inject

RANK = 8
PEER = "PEFT LoRA, target_parameters"
ATTENTION = "(q|k|v|o)_proj"
MATRICES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base_work(quick: bool) -> Work:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32} if quick else {}
    settings: dict[str, Any] = {
        **{"hidden_size": 256, "moe_intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"head_dim": 32, "num_hidden_layers": 4, "vocab_size": 2000, "num_experts": 16, "num_experts_per_tok": 4},
    }
    config = Qwen3MoeConfig(**settings | sizes)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    tokens = torch.randint(config.vocab_size, (2, 32) if quick else (4, 128))
    vectors = model.get_input_embeddings()(tokens)

    def forward(model: nn.Module) -> torch.Tensor:
        return model(inputs_embeds=vectors.detach().requires_grad_(), labels=tokens, use_cache=False).loss

    return Work(model, "all-linear", forward, tokens.numel(), RANK)


def lora_of_peft(model: nn.Module, work: Work) -> nn.Module:
    config = peft.LoraConfig(r=RANK, target_modules=f".*{ATTENTION}", target_parameters=MATRICES)
    return peft.get_peft_model(model, config)


def ours(model: nn.Module, work: Work, sparse: bool, modules: str = "all-linear") -> nn.Module:
    shapes = [site.matrix.shape for site in find_sites(model) if not site.by_name_only]
    share = RANK * sum(map(sum, shapes)) / sum(shape.numel() for shape in shapes)
    inject(model, partial(SparseExpert, keep_ratio=share) if sparse else partial(LoRAExpert, rank=RANK), modules)
    return model


CONTENDERS = [
    Contender("frozen", lambda model, work: model, owns_base=True),
    Contender("LoRA, attention alone", partial(ours, sparse=False, modules=ATTENTION), owns_base=True),
    Contender(PEER, lora_of_peft, owns_base=True),
    Contender("LoRA", partial(ours, sparse=False), owns_base=True),
    Contender("entries", partial(ours, sparse=True), owns_base=True),
]


def show(report: dict[str, Any]) -> None:
    print_machine(report)
    columns = {"over_frozen": "time / frozen", "over_peft": "time / PEFT", "kept_over_peft": "kept for backward / PEFT"}
    print_table("A step", report["rows"], columns | {"trained": "trained"})


def main() -> None:
    parser = Parser(__doc__, quick="a tiny model, to see that it runs")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 1 if options.quick else options.repeats
    output(options, {"rows": measure(CONTENDERS, base_work(options.quick), repeats, PEER)}, show)


if __name__ == "__main__":
    main()
