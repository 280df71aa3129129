"""Run `modular-experts completion`, which prints the script that completes commands, options and paths in a shell."""

from __future__ import annotations

import re
from typing import Literal

from modular_experts.cli.commands import VERBS
from modular_experts.cli.help import command_help, training_help

_SCRIPT = """\
_modular_experts() {
  local word=${COMP_WORDS[COMP_CWORD]} words=
  if [ "$COMP_CWORD" = 1 ]; then
    words="%s"
  elif [[ $word == -* ]]; then
    case ${COMP_WORDS[1]} in
%s
    esac
  else
    COMPREPLY=($(compgen -f -- "$word"))
    return
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o filenames -F _modular_experts modular-experts"""


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print a script for a shell's start-up file, which completes commands, options and paths.

    Args:
        shell: The shell that reads the script.

    Examples:
        modular-experts completion bash >> ~/.bashrc
        modular-experts completion zsh >> ~/.zshrc
    """
    cases = []
    for verb, command in VERBS.items():
        shown = command_help(verb, command, True) if command.function else training_help(verb, command.summary)
        options = re.findall(r"^  (--[\w-]+)", shown.partition("\nexamples:")[0], re.MULTILINE)
        cases.append(f'      {verb}) words="{" ".join(options)}" ;;')
    if shell == "zsh":
        print("autoload -U +X compinit bashcompinit && compinit && bashcompinit")
    print(_SCRIPT % (" ".join(VERBS), "\n".join(cases)))
