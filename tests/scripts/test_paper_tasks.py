"""scripts/paper_tasks.py makes twenty task files that the study of the paper reads."""

import json
from pathlib import Path

import pytest
import yaml
from testbed.documents import ROOT


def test_twenty_tasks_keep_a_word_in_one_split_and_the_config_finds_them(tmp_path: Path, monkeypatch) -> None:
    for package in ("babel", "lemminflect"):
        pytest.importorskip(package, reason="pip install babel lemminflect")
    from paper_tasks import write

    monkeypatch.chdir(tmp_path)
    write(Path("data/made"))
    tasks = yaml.safe_load((ROOT / "configs/paper/made.yaml").read_text(encoding="utf-8"))["tasks"]
    files = {role: sorted(tmp_path.glob(tasks[role][0])) for role in ("held_in", "held_out")}
    assert {role: len(found) for role, found in files.items()} == {"held_in": 15, "held_out": 5}
    of_word: dict[str, set[str]] = {}
    for file in (*files["held_in"], *files["held_out"]):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert {row["split"] for row in rows} == {"train", "validation", "test"}
        assert len({row["input"] for row in rows}) == len(rows), file.name
        for row in rows if file.stem in ("plural", "past", "participle", "gerund") else []:
            of_word.setdefault(row["input"].split(": ")[1], set()).add(row["split"])
    assert {len(splits) for splits in of_word.values()} == {1}
    past = (tmp_path / "data/made/held_in/past.jsonl").read_text(encoding="utf-8")
    back = (tmp_path / "data/made/held_in/infinitive.jsonl").read_text(encoding="utf-8")
    trained = {(row["input"].split(": ")[1], row["target"]) for row in map(json.loads, past.splitlines())}
    assert trained & {(row["target"], row["input"].split(": ")[1]) for row in map(json.loads, back.splitlines())}
