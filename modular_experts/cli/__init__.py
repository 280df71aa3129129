"""Parse a command line, call one function of the library, and print what it returns.

A file holds a group of commands. `command.py` runs a command that is one function, `training.py` those that run a
trainer; `words.py` reads options as people type them, `help.py` writes help without importing torch. `settings/` reads
the settings that options and studies share. A system may bring commands of its own
(`systems/*/commands.py`), which print as these do; no other room imports this one.
"""
