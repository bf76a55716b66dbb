"""`fusedkd bench`: its arguments, its exit codes."""

from __future__ import annotations

import sys

from fusedkd.errors import UserError, as_user_error

from .options import parse


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 where fusedkd's own answer is wrong; 2 for arguments that cannot be, or a
    divergence that a backend lacks."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options = parse(arguments)
        with as_user_error("`pip install fusedkd[bench]`", of=ImportError):
            from .run import replot, run  # help needs less than they do

        return replot(options) if options.replot else run(options, arguments)
    except SystemExit as done:
        return int(done.code or 0)
    except (UserError, ValueError, NotImplementedError) as error:
        print(f"fusedkd bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fusedkd bench: interrupted; nothing was saved.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
