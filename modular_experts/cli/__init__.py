"""Parse a command line, call one function of the library, and print what it returns.

A file holds a group of commands. `command.py` runs a command that is one function, `training.py` those that run a
trainer; `arguments.py` reads options as people type them, `parser_errors.py` explains wrong ones, `help.py` writes help
without importing torch. No other room imports this one, and jsonargparse lives only here.
"""
