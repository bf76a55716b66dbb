"""``fusedkd config``: the files that come with the package, and where they are."""

from __future__ import annotations

from textwrap import shorten

from fusedkd.errors import UserError
from fusedkd.parser import Parser
from fusedkd.shipped import shipped

ABOUT = """\
Recipes, which `fusedkd distill --config NAME` knows by name, and files for `accelerate launch`.

Without a name: all of them, with the first line of each. With one: where the file is, to read it,
to copy it, or to hand it over:

  accelerate launch --config_file $(fusedkd config fsdp2) $(which fusedkd) distill ..."""

KINDS = {"recipes": "fusedkd distill --config", "configs": "accelerate launch --config_file"}


def main(argv: list[str]) -> int:
    """``fusedkd config``; the exit code.

    Raises:
        UserError: nothing has that name.
    """
    parser = Parser("config", ABOUT)
    parser.add_argument("name", nargs="?", help="of a recipe, or of a file for accelerate")
    name = parser.parse_args(argv).name
    files = {kind: shipped(kind) for kind in KINDS}
    if name is None:
        for kind, purpose in KINDS.items():
            print(f"for {purpose}:")
            for each, path in files[kind].items():
                first = path.read_text(encoding="utf-8").partition("\n")[0]
                print(f"  {each:<18}{shorten(first.removeprefix('# '), 80, placeholder=' ...')}")
        return 0
    known = files["recipes"] | files["configs"]
    if name not in known:
        raise UserError(f"{name}: no such recipe or file: expected one of {', '.join(known)}.")
    print(known[name])
    return 0
