"""The command `sam-optim`: measure checkpoints, draw the loss around them, put results on a page.

What is imported here and in `options` costs no torch: `sam-optim --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sam_optim.core.errors import run


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 where a checkpoint failed or a number is not finite; 2 for what the user can mend; 130 for
    Ctrl-C."""
    return run(_dispatch, sys.argv[1:] if argv is None else argv)


def _dispatch(argv: Sequence[str]) -> int:
    from sam_optim.cli import options

    args = options.parse(argv)
    if args.command == "measure":
        from sam_optim.sweep.study import measure

        return measure(args)
    if args.command == "landscape":
        from sam_optim.cli.landscapes import landscape

        return landscape(args)
    from sam_optim.cli.reports import report

    return report(args)


__all__ = ["main"]
