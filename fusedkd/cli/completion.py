"""``fusedkd completion``: what bash and zsh need to complete commands, flags and names."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from unittest import mock

from fusedkd.cli.main import COMMANDS
from fusedkd.errors import as_user_error
from fusedkd.parser import OneSentence, Parser
from fusedkd.shipped import shipped

ABOUT = """\
Print what your shell needs to complete fusedkd's commands, their flags, and the recipes' names.

  bash:   fusedkd completion bash > ~/.local/share/bash-completion/completions/fusedkd
  zsh:    fusedkd completion zsh > "${fpath[1]}/_fusedkd"

It takes some seconds, for every command is loaded."""

HELP = {"distill": "--help-all"}  # where --help leaves flags out
PARTS = {"cache": ("verify", "info", "show", "import")}
# --config takes a recipe's name, or a file.
RECIPE = {"bash": "_fusedkd_recipe", "zsh": "_fusedkd_recipe"}
FUNCTIONS = {
    "bash": """_fusedkd_recipe() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}""",
    "zsh": """_fusedkd_recipe() {{ compadd {names}; _files }}""",
}


def main(argv: list[str]) -> int:
    """``fusedkd completion``; the exit code."""
    parser = Parser("completion", ABOUT)
    parser.add_argument("shell", choices=tuple(FUNCTIONS), help="which one")
    shell = parser.parse_args(argv).shell
    with as_user_error("fusedkd completion needs `pip install fusedkd[train]`"):
        import shtab

    root = argparse.ArgumentParser("fusedkd")
    root.add_argument("--version", action="store_true", help="which one is installed")
    commands = {name: _parser_of(name) for name in COMMANDS if name != "completion"}
    _put_below(root, commands | {"completion": parser})
    for name, parts in PARTS.items():
        _put_below(commands[name], {part: _parser_of(name, part) for part in parts})
    function = FUNCTIONS[shell].format(names=" ".join(shipped("recipes")))
    print(shtab.complete(root, shell, preamble=function))
    return 0


def _parser_of(command: str, *part: str) -> argparse.ArgumentParser:
    """The parser that a command answers --help with."""
    found: list[argparse.ArgumentParser] = []
    caught = mock.patch.object(
        OneSentence, "print_help", lambda self, file=None: found.append(self)
    )
    with caught, contextlib.suppress(SystemExit):
        COMMANDS[command]([*part, HELP.get(command, "--help")])
    for action in found[0]._actions:
        if action.nargs != 0 and not action.choices and action.type in (None, str, Path):
            is_config = "--config" in action.option_strings
            action.complete = RECIPE if is_config else "file"  # type: ignore[attr-defined]
    return found[0]


def _put_below(parser: argparse.ArgumentParser, parts: dict[str, argparse.ArgumentParser]) -> None:
    """As sub-commands."""
    action = parser.add_subparsers(parser_class=argparse.ArgumentParser)
    for name, part in parts.items():
        action.add_parser(name, help=str(part.description).partition("\n")[0])
        action.choices[name] = part
