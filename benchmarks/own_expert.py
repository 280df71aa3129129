"""How many test rows routers send to the expert of their task, and how many rows of unseen tasks they reject.

Routers learn from a number of inputs a task, drawn anew for each draw from the training and validation rows; every test
row is then scored once. No expert is needed. `--unseen` takes tasks that no router learns.

    python benchmarks/own_expert.py .cache/smollm2 data/snips_intent.jsonl ... --unseen data/banking77.jsonl ... \
        [--rows 16 64 250] [--draws 5] [--json FILE]       an hour for fifteen tasks and two routers
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import Parser
from torch import Tensor

from modular_experts import Base
from modular_experts.data import TaskMixture
from modular_experts.routing import Centroid, KernelRidge, Router
from modular_experts.routing.router import GRAMS
from modular_experts.statistics.take import batches_by_length, prompts

ROUTERS = {"Centroid": Centroid, "KernelRidge": KernelRidge}


def read(model: Any, data: TaskMixture, splits: Sequence[str]) -> dict[str, Tensor]:
    """Return the vectors of each task's inputs `(rows, size)`, with their n-grams behind."""
    found = {}
    for task, examples in data.input_examples(splits).items():
        measured = prompts(model, batches_by_length(examples, data), [], depths=Router.depths)
        found[task] = torch.cat([one.values for one in measured.values()], 1)
    return found


def compare(learned: Sequence[Tensor], own: Sequence[Tensor], unseen: Sequence[Tensor], name: str) -> dict[str, float]:
    """Return shares in %, each the mean over the tasks."""
    router: Any = ROUTERS[name]()
    read_by_it = slice(None) if router.reads_grams else slice(-GRAMS)
    router.learn([], [rows[:, read_by_it] for rows in learned])

    def mean(shares: Sequence[Tensor]) -> float:
        return 100 * statistics.fmean(float(share.float().mean()) for share in shares) if shares else 0.0

    rejected = [[router(rows[:, read_by_it]).ids[:, 0] == len(learned) for rows in part] for part in (own, unseen)]
    right = [router.scores(rows[:, read_by_it]).argmax(1) == number for number, rows in enumerate(own)]
    return {"own": mean(right), "own rejected": mean(rejected[0]), "unseen rejected": mean(rejected[1])}


def main() -> None:
    parser = Parser(__doc__)
    examples = sorted(Path(__file__).parents[1].glob("examples/*.jsonl"))
    parser.add_argument("base", nargs="?", default=".cache/smollm2")
    parser.add_argument("tasks", nargs="*", type=Path, default=examples)
    parser.add_argument("--unseen", nargs="*", type=Path, default=[])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 250])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = Base.open(options.base)
    model, files = base.load("float32"), {"tasks": options.tasks, "unseen": options.unseen}
    data = {name: TaskMixture(part, base.tokenizer()) for name, part in files.items() if part}
    pool = list(read(model, data["tasks"], ["train", "validation"]).values())
    own = list(read(model, data["tasks"], ["test"]).values())
    unseen = list(read(model, data["unseen"], ["test"]).values()) if options.unseen else []
    print("| inputs a task | router | own expert, % | own rejected, % | unseen rejected, % |\n|---|---|---|---|---|")
    rows = []
    for count in options.rows:
        for name in ROUTERS:
            found = []
            for draw in range(options.draws):
                made = torch.Generator().manual_seed(draw)
                drawn = [inputs[torch.randperm(len(inputs), generator=made)[:count]] for inputs in pool]
                found.append(compare(drawn, own, unseen, name))
            rows.append({"rows": count, "router": name, "draws": found})
            cells = [f"{statistics.fmean(one[key] for one in found):.1f}" for key in found[0]]
            print(f"| {count} | `{name}` | {' | '.join(cells)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
