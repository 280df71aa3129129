"""What `combine` and an interrupted merge keep is used again only while all that it depends on is the same.

Studies are in `test_pieces.py`, and `evaluate` among the random cases of `soak/`.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from testbed.own_files import ScaledSum
from testbed.random_deltas import write_random

from modular_experts import Distilled, TaskMixture, combine, merge
from modular_experts.routing import Constant

WEIGHTS = {"model.layers.0.self_attn.q_proj.weight": (32, 32), "model.layers.0.mlp.down_proj.weight": (32, 48)}


@pytest.fixture
def place(tmp_path, one_block, monkeypatch) -> Path:
    """The current directory, with a base, a task and an expert for each of two names, and a file with a number."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(one_block, "base")
    for number, name in enumerate("ab"):
        write_random(Path("library", name), Path("base"), WEIGHTS, number, [name])
        splits = ["train", "train", "validation", "test", "test"]
        rows = [{"input": f"{name}{row}", "target": str(row), "split": split} for row, split in enumerate(splits)]
        write_rows(Path(f"{name}.jsonl"), rows)
    Path("number.txt").write_text("2")
    return tmp_path


def stops_after_one(items: Sequence[Any]) -> Iterator[Any]:
    """Show the progress of one item, and interrupt the work."""
    yield next(iter(items))
    raise KeyboardInterrupt


def test_a_merge_goes_on_only_while_the_file_of_its_method_is_the_same(place) -> None:
    experts, method = ["library/a", "library/b"], ScaledSum("number.txt")
    for number in ("2", "3"):
        with pytest.raises(KeyboardInterrupt):
            merge(experts, method, "merged", progress=stops_after_one)
        Path("number.txt").write_text(number)
        mixed = merge(experts, method, "merged", overwrite=True)
        fresh = merge(experts, method, f"fresh-{number}")
        assert mixed.content_hash == fresh.content_hash
        shutil.rmtree("merged")


def test_a_combination_is_made_anew_where_a_file_of_its_settings_has_changed(place) -> None:
    method = Distilled(start=ScaledSum("number.txt"), steps=1, batch=1, max_new_tokens=2)
    data = TaskMixture(["a.jsonl", "b.jsonl"])

    def losses(out: str, **how: Any) -> list[Any]:
        # A router that needs no statistics gives each prompt the sum of the experts.
        combined = combine(["library/a", "library/b"], out, data, method, Constant([1.0, 1.0]), **how)
        return [(way.name, way.loss) for way in combined.ways]

    before = losses("kept")
    assert losses("kept") == before
    Path("number.txt").write_text("3")
    with pytest.raises(FileExistsError, match="kept"):
        losses("kept")
    after = losses("kept", overwrite=True)
    assert after == losses("fresh")
    assert after != before
