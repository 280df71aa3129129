"""Long work prints lines where there is no terminal, and short work none."""

from itertools import count
from types import SimpleNamespace

from modular_experts.cli.format import progress_bar


def test_a_line_comes_at_every_tenth_of_work_that_takes_more_than_five_seconds(monkeypatch, capsys) -> None:
    for seconds, wanted in ((2.5, [2, *range(4, 41, 4)]), (0.01, [])):
        ticks = count()
        clock = SimpleNamespace(monotonic=lambda ticks=ticks, seconds=seconds: seconds * next(ticks))
        monkeypatch.setattr("modular_experts.cli.format.time", clock)
        assert list(progress_bar("searching")(range(40))) == list(range(40))
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"searching: {done} of 40" for done in wanted]
    assert list(progress_bar("searching")([])) == []
