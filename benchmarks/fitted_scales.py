"""What the fit of scales to the layers' outputs, which `shrink` makes, changes in experts of few bits, on test rows.

Each expert `KIND-TASK` of a library is stored in forms of one and two bits, with scales as they are and with scales
fitted on validation rows, in equally many bytes. Its loss, in nats a target token, and its exact match (each target
token is the likeliest after the ones before it) are measured on test rows of its own task. The cost is the CPU time of
the fit over the time of one measurement of the same validation rows.

    python benchmarks/fitted_scales.py .cache/smollm2 runs/real/library data/snips_intent.jsonl ... \
        [--kinds sparse block] [--rows 16] [--test_rows 32] [--json FILE]       ten minutes for eight tasks
"""

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import Parser

from modular_experts import Base, applied, open_expert
from modular_experts.data import TaskMixture
from modular_experts.deltas import Delta
from modular_experts.deltas.algebra import scale_rows
from modular_experts.evaluation.likelihood import batch_losses, greedy_matches
from modular_experts.library.form import Form
from modular_experts.tuning import Objective
from modular_experts.tuning.scales import fitted_factors

FORMS = [Form("sign", 0.5), Form("sign"), Form("magnitudes2", 0.75)]


@torch.no_grad()
def tested(model: Any, deltas: Mapping[str, Delta], batches: Any) -> dict[str, float]:
    """Return the exact match in % and the loss of an expert on the rows of some batches."""
    matches, losses = [], []
    with applied(model, deltas, check=False):
        for batch in batches:
            matches.append(greedy_matches(model, batch))
            losses.append(torch.stack(batch_losses(model, batch)))
    loss, tokens = torch.cat(losses, 1).sum(1).tolist()
    return {"exact": 100 * float(torch.cat(matches).float().mean()), "loss": loss / tokens}


def compare(model: Any, deltas: Mapping[str, Delta], chosen: Objective, batches: Any) -> dict[str, Any]:
    """Return the scores of the expert, of each form as it is and with fitted scales, and the cost of the fit."""
    (task,) = chosen.batches
    forms = [form for form in FORMS if form.keep == 1 or any(d.units for d in deltas.values())]
    cuts = [{name: form.cut(delta) for name, delta in deltas.items()} for form in forms]
    codings = [lambda name, form=form, cut=cut: form.read(cut[name]) for form, cut in zip(forms, cuts, strict=True)]
    times = [time.process_time()]
    factors = fitted_factors(model, chosen.batches[task], deltas, codings)
    times.append(time.process_time())
    chosen.losses_with(deltas)
    times.append(time.process_time())
    result: dict[str, Any] = {"cost": (times[1] - times[0]) / (times[2] - times[1])}
    result["float32"] = tested(model, deltas, batches)
    for form, cut, own in zip(forms, cuts, factors, strict=True):
        scaled = {name: scale_rows(delta, own[name]) if name in own else delta for name, delta in cut.items()}
        for name, part in ((f"{form}", cut), (f"{form}, fitted", scaled)):
            result[name] = tested(model, {n: form.read(delta) for n, delta in part.items()}, batches)
    return result


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("base")
    parser.add_argument("library", type=Path)
    parser.add_argument("tasks", nargs="+", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["sparse", "block"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--test_rows", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base, rows = Base.open(options.base), []
    model: Any = base.load("float32").eval()

    def read(file: Path, limit: int) -> TaskMixture:
        return TaskMixture([file], base.tokenizer(), max_length=256, eval_limit=limit, eval_batch_size=8)

    for file in options.tasks:
        chosen, data = Objective(model, read(file, options.rows)), read(file, options.test_rows)
        data.prepare_data()
        data.setup("test")
        for kind in options.kinds:
            expert = open_expert(options.library / f"{kind}-{file.stem}")
            found = compare(model, dict(expert.items()), chosen, list(data.test_dataloader()))
            rows.append({"kind": kind, "task": file.stem, **found})
            if options.json:
                options.json.write_text(json.dumps(rows))
    print("| kind | form | exact match, % | loss |\n|---|---|---|---|")
    for kind in options.kinds:
        own = [row for row in rows if row["kind"] == kind]
        for form in [name for name in own[0] if name not in ("kind", "task", "cost")]:
            exact, loss = (statistics.fmean(row[form][key] for row in own) for key in ("exact", "loss"))
            print(f"| {kind} | {form} | {exact:.1f} | {loss:.3f} |")
        print(f"| {kind} | the fit, in measurements of its rows | {statistics.median(r['cost'] for r in own):.2f} | |")


if __name__ == "__main__":
    main()
