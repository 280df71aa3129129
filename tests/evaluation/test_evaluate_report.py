"""The headings of a comparison's page name the best models, and say so where all are level."""

from pathlib import Path

import pytest

from modular_experts.evaluation.compare import write_report
from modular_experts.reports import Results


@pytest.mark.parametrize(
    ("scores", "leader"),
    [
        ({"base": [0.0, 0.0], "a": [0.0, 0.0]}, "All models are level on held-in tasks: exact 0.0 %"),
        (
            {"base": [0.0, 0.0], "a": [1.0, 0.0], "b": [1.0, 0.0]},
            "a and b are best on held-in tasks: exact 50.0 %, base 0.0 %",
        ),
        ({"base": [1.0, 0.0], "a": [0.0, 0.5]}, "base is best on held-in tasks: exact 50.0 %"),
    ],
)
def test_no_model_is_called_best_of_those_that_look_alike(tmp_path, scores, leader) -> None:
    rows = [
        {
            "model": model,
            "experts": [],
            "task": task,
            "role": "held_in",
            "metric": "exact_match",
            "value": value,
            "rows": 4,
        }
        for model, values in scores.items()
        for task, value in zip(("x", "y"), values, strict=True)
    ]
    facts = {"versions": {"modular-experts": "0"}, "date": "", "examples": [], "models": {}, "base": "", "machine": ""}
    write_report(Results(rows, facts | {"dtype": "", "max_new_tokens": 3}), tmp_path / "page.html")
    page = Path(tmp_path / "page.html").read_text().replace("&#160;", " ")
    assert leader in page
