"""benchmarks/answer_logits.py runs as it stands, and its three ways give one loss."""

import json

from testbed.scripts import run_script, shown


def test_the_three_ways_are_timed_and_agree() -> None:
    report = json.loads(run_script("answer_logits.py", "--quick", "--json"))
    works = [(dtype, work) for dtype in ("float32", "bfloat16") for work in ("training step", "forward", "generation")]
    assert [(row["dtype"], row["work"]) for row in report["rows"]] == works
    for row in report["rows"]:
        assert row["places"] == 1
        assert 0.05 < row["slice"] < 1000
        if row["work"] != "generation":
            assert 0.05 < row["whole"] < 1000
            assert row["losses_apart"] < (1e-5 if row["dtype"] == "float32" else 1e-2)
    assert all(row["losses_apart"] < 1e-5 and row["time"] > 0 for row in report["parts"])
    assert {"CPU", "threads", "torch"} <= set(report["machine"])
    assert shown("answer_logits", report).count("\n| bfloat16, ") == 3
