"""What a training step over a quantised base costs, beside PEFT's over the same base: time, and what autograd keeps.

A Llama of 135 million parameters with random weights is quantised while it is loaded, and each way of `contenders`
takes training steps with 4 x 128 tokens. They take turns on one thread, in an order drawn anew for each round; the
times are ratios of medians of CPU time. The bytes that autograd keeps for backward are counted by
`torch.autograd.graph.saved_tensors_hooks`, each memory once, without the parameters of the model.

With `--errors` it prints how far off the weights of each form are, in a layer of 576 x 576 whose entries are normally
distributed.

    python benchmarks/quantised.py [--form nf4] [--dtype float32] [--repeats 5] [--json] [--quick]      8 minutes
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from contenders import CONTENDERS, SIZES, Contender, Step, Work, language_model
from measuring import Parser, goal, output, print_goals, print_machine, print_table, race
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from modular_experts.base import Base
from modular_experts.base.quantised import Quantise, read_weight

WAYS = [
    *("frozen", "PEFT LoRA", "PEFT SHiRA", "LoRA"),
    *("entries, native", "tiles of 16, native", "rows, slices", "dense, masked"),
]
GOALS = {"kept_over_peft": 1.02, "over_peft": 1.10}
"""The most of a step's memory and time that a sparse expert may take, over PEFT's LoRA."""


def quantised(work: Work, form: str, dtype: Any) -> Work:
    """Return the same work over a base that was quantised while it was loaded from disk."""
    with tempfile.TemporaryDirectory() as folder:
        work.base.save_pretrained(folder)  # type: ignore[operator]
        model = Base.open(folder, quantise=None if form == "none" else form).load(dtype)  # type: ignore[arg-type]
    return replace(work, base=model.requires_grad_(False))


def kept_bytes(step: Step) -> int:
    """Return the bytes that autograd keeps for the backward pass of a step, beside the model's parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    found: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage  # which keeps it, so that no other memory gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.work.forward(step.model)
    total = sum(storage.nbytes() for storage in found.values())
    found.clear()
    loss.backward()
    step.optimizer.zero_grad() if step.optimizer else None
    return total


def measure(contenders: Sequence[Contender], work: Work, repeats: int, over: str) -> list[dict[str, Any]]:
    """Return a row for each way: its time and what it keeps, over the one of PEFT that is named, and over `frozen`."""
    steps = {one.name: Step(one, work) for one in contenders}
    kept = {name: kept_bytes(step) for name, step in steps.items()}
    median = {name: statistics.median(seconds) for name, seconds in race(steps, repeats, 2).items()}
    return [
        {
            "name": name,
            "over_peft": median[name] / median[over],
            "over_frozen": median[name] / median["frozen"],
            "kept_over_peft": kept[name] / kept[over],
            "trained": sum(parameter.numel() for parameter in step.trained),
        }
        for name, step in steps.items()
    ]


def errors() -> dict[str, float]:
    """Return, for each form, the norm of the error over the norm of a weight with normally distributed entries."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**SIZES[False], "num_hidden_layers": 1, "vocab_size": 8}))
    name = "model.layers.0.self_attn.q_proj"
    weight = base.get_parameter(f"{name}.weight").detach()
    work, found = Work(base, "", lambda model: weight, 0, 0), {}
    for form in get_args(Quantise):
        layer: Any = quantised(work, form, "float32").base.get_submodule(name)
        found[form] = float((read_weight(layer, torch.float32) - weight).norm() / weight.norm())
    return found


def show(report: dict[str, Any]) -> None:
    print_machine(report)
    columns = {"over_peft": "time / PEFT LoRA", "over_frozen": "/ frozen", "kept_over_peft": "kept / PEFT LoRA"}
    print_table(f"{report['form']}, {report['dtype']}", report["rows"], columns | {"trained": "trained"})
    ours = [row for row in report["rows"] if row["name"].startswith(("entries", "tiles", "rows"))]
    print_goals(goal(key, max(row[key] for row in ours), limit) for key, limit in GOALS.items())


def main() -> None:
    parser = Parser(__doc__, quick="a tiny model, to see that it runs")
    parser.add_argument("--form", default="nf4", help="form of the base, or none for a plain one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--errors", action="store_true", help="print the errors of all forms only")
    options = parser.parse_args()
    if options.errors:
        print("\n".join(f"{form}: {error:.2%}" for form, error in errors().items()))
        return
    torch.set_num_threads(1)
    work = quantised(language_model(options.quick), options.form, options.dtype)
    ways = [one for one in CONTENDERS if one.name in WAYS]
    rows = measure(ways, work, 1 if options.quick else options.repeats, "PEFT LoRA")
    output(options, {"form": options.form, "dtype": options.dtype, "rows": rows}, show)


if __name__ == "__main__":
    main()
