"""Make objects of settings, as YAML files and command lines hold them, and run a fit of them.

`make.py` does both for settings in Python; open it first. `arguments.py` reads words and folds config files,
`training.py` is LightningCLI over `ExpertModule`, and `parser_errors.py` writes the sentence where settings do not fit.
What is below is all that a command needs before it imports them.
"""


class UsageError(ValueError):
    """A command line or a config file is wrong; the message is the sentence for the user."""


class Options:
    """A dataclass whose fields are options of a command, which takes the object as one argument."""


SHORT_NAMES = {
    "base": "model.base",
    "tasks": "data.tasks",
    "expert": "model.expert",
    "modules": "model.modules",
    # `model.experts` gives each pattern of layers its type; elsewhere `--experts` are directories, as they are here.
    "experts": "model.applied",
    "applied": "model.applied",
    "steps": "trainer.max_steps",
    "learning_rate": "model.learning_rate",
    "batch_size": "data.batch_size",
}
"""Short names of options of `fit`, `validate`, `test` and `predict`, and of the settings of a fit."""

TRUST = {"--trust A [B ...]": "Your modules, whose classes records may name."}
"""The option of every command by which experts with routers and plans of your own open (`library/described.py`)."""

OWN_OPTIONS = {
    "--out LIBRARY/NAME": "Directory of the expert; without it, none is kept.",
    "--overwrite": "Replace an expert.",
    "--gate-of A [B ...]": "Train gates of stored experts, for Phatgoose.",
    "--dry-run": "Only print what it would do, and the time and memory.",
}
"""Options of `fit` that are arguments of no class, and their texts."""
