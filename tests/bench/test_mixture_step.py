"""benchmarks/mixture_step.py runs as it stands: all ways train as much, and autograd keeps less than with PEFT."""

import json

import pytest
from testbed.peft_adapters import PEFT_WARNINGS
from testbed.scripts import run_script

pytestmark = [pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS]


def test_experts_of_matrices_keep_less_for_backward_than_peft() -> None:
    rows = {row["name"]: row for row in json.loads(run_script("mixture_step.py", "--quick", "--json"))["rows"]}
    peer = rows["PEFT LoRA, target_parameters"]
    assert rows["LoRA"]["trained"] == peer["trained"]
    assert 0.99 * peer["trained"] < rows["entries"]["trained"] <= peer["trained"]
    assert rows["frozen"]["kept_over_peft"] < rows["LoRA"]["kept_over_peft"] < 1
    assert rows["entries"]["kept_over_peft"] < 1
