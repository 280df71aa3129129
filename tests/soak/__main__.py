"""Run random cases, print one JSON line a case, and a table of families at the end.

make soak                                   an hour, from a seed that the clock gives
make soak MINUTES=5 SEED=100 FAMILIES=merge
make soak FAMILIES=merge SEED=17 CASES=1    one case again
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, help="of the first case of each family; the others count on from it")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="the most cases of a family")
    parser.add_argument("--families", nargs="+", help="all of them by default")
    parser.add_argument("--log", type=Path, help="a file that gets the lines, too")
    options = parser.parse_args()
    first = int(time.time()) if options.seed is None else options.seed

    import torch
    import transformers

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    from soak.case import Case, end_of
    from soak.families import all_families, left_out

    known = all_families()
    names = options.families or sorted(known)
    if unknown := set(names) - known.keys():
        parser.error(f"no families {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    for family, package in left_out().items():
        if family in names:
            names.remove(family)
            print(f"{family} is left out: {package} is not installed")
    seconds = dict.fromkeys(names, 0.0)
    endings: dict[str, list[str]] = {name: [] for name in names}
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        while time.monotonic() < deadline:
            open_families = [name for name in names if len(endings[name]) < options.cases]
            if not open_families:
                break
            # All families get the same time.
            family = min(open_families, key=seconds.__getitem__)
            folder = Path(work, "case")
            folder.mkdir()
            case = Case(family, first + len(endings[family]), folder)
            ending = end_of(case, known[family])
            shutil.rmtree(folder)
            seconds[family] += ending.seconds
            endings[family].append(ending.outcome)
            facts = {
                "family": family,
                "seed": case.seed,
                "outcome": ending.outcome,
                "seconds": round(ending.seconds, 2),
            }
            line = json.dumps(facts | {"text": ending.text, **case.facts}, default=str)
            print(line, flush=True)
            if options.log is not None:
                with options.log.open("a", encoding="utf-8") as log:
                    log.write(line + "\n")
    print(f"{'family':<20}{'cases':>8}{'held':>8}{'refused':>9}{'MISMATCH':>10}{'CRASH':>7}{'seconds':>9}")
    for name in names:
        counts = [endings[name].count(outcome) for outcome in ("held", "refused", "MISMATCH", "CRASH")]
        held, refused, mismatches, crashes = counts
        print(f"{name:<20}{sum(counts):>8}{held:>8}{refused:>9}{mismatches:>10}{crashes:>7}{seconds[name]:>9.0f}")
    bad = sum(outcome in ("MISMATCH", "CRASH") for outcomes in endings.values() for outcome in outcomes)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
