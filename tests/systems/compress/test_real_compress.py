"""On SmolLM2 and real text, 80 % of the parameters: correction beats the cut, and experts learn.

Slow: two minutes of CPU time.
"""

import os
from pathlib import Path

import pytest

from modular_experts.__main__ import main
from modular_experts.data import Task, TaskMixture
from modular_experts.evaluation import evaluate
from modular_experts.systems.compress.compress import Reduction, compress

pytestmark = pytest.mark.slow

SMOLLM2 = Path(__file__).parents[3] / ".cache" / "smollm2"


def test_a_smaller_smollm2_speaks_and_learns(tmp_path, monkeypatch) -> None:
    folder = os.environ.get("MODULAR_EXPERTS_DATA")
    if not folder or not SMOLLM2.is_dir():
        pytest.skip("MODULAR_EXPERTS_DATA names no folder of task files, or `make smollm2` was not run")
    files = [str(Path(folder).resolve() / f"{name}.jsonl") for name in ("snips_intent", "clinc_banking")]
    monkeypatch.chdir(tmp_path)
    found = compress(SMOLLM2, files, "smaller", Reduction(keep=0.8, evaluations=2, tokens=2048, test_tokens=1024))
    assert 0.78 * found.base <= found.parameters <= 0.8 * found.base
    perplexity = found.perplexity
    assert perplexity["base"] < perplexity["reformed"] < perplexity["cut"]
    fit = ["fit", "--base", "smaller", "--expert", "LoRAExpert", "--modules", "q_proj", "v_proj"]
    assert main([*fit, "--tasks", files[0], "--steps", "20", "--out", "library/intent"]) == 0
    data = TaskMixture([Task(path=files[0])], eval_limit=32)
    rows = evaluate("smaller", {"base": [], "expert": ["library/intent"]}, data, max_new_tokens=None)
    loss = {model: rows.where(model=model).mean("loss") for model in ("base", "expert")}
    assert loss["expert"] < loss["base"]
