"""The library names arguments of Python, and a command names options in their place."""

import logging

from modular_experts.cli.option_names import OptionRecord, as_options


def test_arguments_in_backticks_become_options() -> None:
    assert as_options("replace it with `overwrite=True`") == "replace it with --overwrite"
    assert as_options("give `experts=['a', 'b']` or `base=DIR`") == "give --experts a b or --base DIR"
    assert as_options("leave out `rank=`; set `trainer.max_epochs=3`") == "leave out --rank; set --trainer.max_epochs 3"
    assert as_options("such as `tasks={path: a, role: held_out}`") == "such as --tasks '{path: a, role: held_out}'"
    assert as_options("go on with `ckpt_path='my runs/a.ckpt'`") == "go on with --ckpt_path 'my runs/a.ckpt'"
    assert as_options("`metrics.year-2=`: /(/ is wrong") == "--metrics.year-2: /(/ is wrong"
    assert as_options("got keep=3, `keep` must be smaller") == "got keep=3, `keep` must be smaller"


def test_only_records_of_this_package_are_translated() -> None:
    ours, theirs = (
        OptionRecord(name, logging.INFO, "", 0, "%s keeps it", ("`out=library/a`",), None)
        for name in ("modular_experts.training.fit", "mine")
    )
    assert ours.getMessage() == "--out library/a keeps it"
    assert theirs.getMessage() == "`out=library/a` keeps it"
