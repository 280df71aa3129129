"""benchmarks/own_expert.py runs as it stands, and finds tasks whose words differ."""

import json

from testbed.scripts import run_script


def test_tasks_with_words_of_their_own_are_told_apart(tmp_path, tiny_llama_dir, task_files) -> None:
    file = tmp_path / "report.json"
    how = ["--unseen", task_files["first"], "--rows", 4, 8, "--draws", 2, "--json", file]
    printed = run_script("own_expert.py", tiny_llama_dir, task_files["upper"], task_files["reverse"], *how)
    rows = json.loads(file.read_text())
    assert [(row["rows"], row["router"], len(row["draws"])) for row in rows] == [
        (4, "Centroid", 2),
        (4, "KernelRidge", 2),
        (8, "Centroid", 2),
        (8, "KernelRidge", 2),
    ]
    assert all(draw["own"] > 90 for row in rows for draw in row["draws"])
    assert "| 8 | `KernelRidge` | 100.0 |" in printed
