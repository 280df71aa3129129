"""Read, divide, mix and train on a task of 100,000 rows, which takes half a minute."""

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets

from modular_experts import LoRAExpert, TaskMixture, fit, open_expert
from modular_experts.data import Equal, Proportional, Temperature
from soak import bases
from soak.case import Case
from soak.fitting import Kind, Watch, check_fit, trainer_of
from soak.reading import Reader
from soak.reference.files import read_expert
from soak.reference.model import Reference
from soak.scoring import near
from soak.tasks import Row, random_word
from soak.validation import mean_loss

COUNT = 100_000
SPLITS = ("train", "validation", "test")
# What a number of rows counts in a mixture.
SHARES: dict[type, Any] = {Proportional: lambda size: size, Equal: lambda size: 1, Temperature: math.sqrt}


def rows_case(case: Case) -> None:
    """Check which rows each split has, which an epoch takes, and which the steps of a fit read."""
    draw = case.random
    kind = draw.choice(bases.KINDS)
    base = bases.base_of(kind)
    stated = draw.choice([0.0, 0.0, 0.3, 1.0])
    large = [random_short(case, number, stated) for number in range(COUNT)]
    small = [random_short(case, number, 1.0) for number in range(draw.choice([30, 3000]))]
    suffixes = draw.sample([".jsonl", ".csv", ".parquet"], 2)
    first, second = [write(case.folder / f"large{suffix}", large) for suffix in suffixes]
    other = write(case.folder / "small.jsonl", small)
    ratios = {"validation_ratio": draw.choice([0.1, 0.003]), "test_ratio": draw.choice([0.1, 0.0, 0.25])}
    division: dict[str, Any] = {**ratios, "split_seed": draw.randrange(9)}
    limit, seed = draw.choice([1, 50, 333]), draw.randrange(100)
    weight, cap = draw.choice([1.0, 0.3, 4]), draw.choice([None, 500, 50_000])
    mixing = draw.choice([Proportional(), Equal(), Temperature(2.0)])
    batch_size, steps = draw.choice([8, 64]), draw.randint(2, 3)
    case.note(base=kind, stated=stated, suffixes=suffixes, small=len(small), division=division, limit=limit)
    case.note(weight=weight, cap=cap, mixing=str(mixing), batch_size=batch_size)

    whole = TaskMixture([str(first)], **division)
    divided = {split: whole.rows(split)["large"] for split in SPLITS}
    check_division(case, large, divided, ratios)
    again = TaskMixture([str(second)], **division, eval_limit=limit)
    case.need(again.contents == whole.contents, f"{suffixes[1]} has other rows than {suffixes[0]}")
    for split in ("validation", "test"):
        rows = divided[split]
        spread = rows if len(rows) <= limit else [rows[place * len(rows) // limit] for place in range(limit)]
        same = [row.input for row in again.rows(split)["large"]] == [row.input for row in spread]
        case.need(same, f"the {limit} {split} rows do not lie evenly in the file")

    own = {"path": str(first), "weight": weight, "cap": cap}
    mixture = TaskMixture([own, str(other)], None, batch_size, **division, eval_limit=limit, mixing=mixing, seed=seed)
    mixture.take_tokenizer(str(base))
    training = [*divided["train"], *mixture.rows("train")["small"]]
    sizes = {"large": len(divided["train"]), "small": len(training) - len(divided["train"])}
    order = check_epochs(case, mixture, sizes, weight, cap)
    expert, watch, out = Kind(LoRAExpert, {"rank": 2}), Watch(), case.folder / "library" / "expert"
    trainer = trainer_of(case.folder, out, watch)
    fit(str(base), mixture, expert.factory, draw.choice(bases.LINEAR[kind]), str(out), steps=steps, trainer=trainer)

    reader = Reader(base, bases.CONTEXT)
    read = [reader.texts(vars(training[place]), choices=False)[0] for place in order[: steps * batch_size]]
    for number, batch in enumerate(watch.batches):
        wanted = read[number * batch_size : (number + 1) * batch_size]
        case.need(Counter(batch) == Counter(wanted), f"step {number} read other rows than the epoch's order has")
    check_fit(case, Reference(base, bases.CONTEXT), kind, expert, read_expert(out), watch, watch.batches)
    trained = Reference(base, bases.CONTEXT, {name: delta.values for name, delta in read_expert(out).items()})
    validation = mixture.rows("validation").values()
    texts = [[reader.texts(vars(row), choices=False)[0] for row in rows] for rows in validation]
    loss = sum(mean_loss(trained.loss, rows) for rows in texts) / len(texts)
    near(case, open_expert(out).record["scores"]["val_loss"], loss, "the validation loss", 1e-4)


def random_short(case: Case, number: int, stated: float) -> Row:
    """Draw a row whose input no other row has, and which states its split in some cases."""
    row: Row = {"input": f"{number} {random_word(case, 5)}", "target": case.random.choice(["yes", "no", "né"])}
    split = case.random.choices(SPLITS, [8, 1, 1])[0] if case.chance(stated) else None
    # Where all rows state it, the first have one of each.
    return row | {"split": SPLITS[number] if stated == 1 and number < len(SPLITS) else split}


def write(path: Path, rows: list[Row]) -> Path:
    """Write rows in the format that the suffix names."""
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(rows)
    ways: dict[str, Any] = {".jsonl": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet}
    ways[path.suffix](path)
    return path


def check_division(case: Case, rows: list[Row], divided: dict[str, list[Any]], ratios: dict[str, float]) -> None:
    """Check that each row is in one split, the stated one if it has one, in the file's order, and check the ratios."""
    places = {row["input"]: number for number, row in enumerate(rows)}
    free = sum(row["split"] is None for row in rows)
    for split, own in divided.items():
        mine = [places[row.input] for row in own]
        case.need(mine == sorted(set(mine)), f"{split} rows are not in the order of the file")
        case.need([rows[place]["target"] for place in mine] == [row.target for row in own], f"targets of {split}")
        stated = {place for place, row in enumerate(rows) if row["split"] == split}
        case.need(stated <= set(mine), f"rows with the split {split} are elsewhere")
        wanted = free * ratios.get(f"{split}_ratio", 1 - sum(ratios.values()))
        added = len(mine) - len(stated)
        case.need(abs(added - wanted) <= 1, f"{added} of {free} rows without a split are for {split}, not {wanted}")
    case.need(sum(map(len, divided.values())) == len(rows), "the splits have other rows than the file")


def check_epochs(case: Case, mixture: TaskMixture, sizes: dict[str, int], weight: float, cap: int | None) -> list[int]:
    """Check how many rows of each task two epochs take, each as often as any other, and return the first's order."""
    capped = {"large": min(sizes["large"], cap or sizes["large"]), "small": sizes["small"]}
    share = SHARES[type(mixture.mixing)]
    parts = {"large": Fraction(weight) * Fraction(share(capped["large"])), "small": Fraction(share(capped["small"]))}
    counts, epoch = mixture.counts, sum(capped.values())
    loader: Any = mixture.train_dataloader()
    orders = []
    for number in range(2):
        loader.sampler.set_epoch(number)
        orders.append(list(loader.sampler))
    case.need(orders[0] != orders[1], "two epochs have one order")
    times = Counter([*orders[0], *orders[1]])
    begin = 0
    for name, part in parts.items():
        wanted = float(epoch * part / sum(parts.values()))
        if name == "large" and cap is not None:
            wanted = min(wanted, cap)
        case.need(abs(counts[name] - wanted) < 1, f"an epoch takes {counts[name]} rows of {name}, not {wanted}")
        drawn = [times[place] for place in range(begin, begin + sizes[name])]
        case.need(sum(drawn) == 2 * counts[name], f"two epochs take {sum(drawn)} rows of {name}, not {2 * wanted}")
        case.need(max(drawn) - min(drawn) <= 1, f"rows of {name} come {min(drawn)} to {max(drawn)} times")
        begin += sizes[name]
    return orders[0]


FAMILIES = {"rows": rows_case}
