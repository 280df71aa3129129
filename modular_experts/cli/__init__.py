"""Parse a command line, call one function of the library, and print what it returns.

A file holds a group of commands. `command.py` reads options and runs a command that is one function, `training.py` the
commands that run a trainer; `help.py` writes help without importing torch. A system may bring commands of its own
(`systems/*/commands.py`); no other room imports this one.
"""
