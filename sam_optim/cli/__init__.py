"""The command `sam-optim`: measure checkpoints, draw the loss around them, put results on a page."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sam_optim import sweep
from sam_optim.cli import options
from sam_optim.core import errors
from sam_optim.sweep.processes import is_first_process

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 where a checkpoint failed or a number is not finite; 2 for what the user can mend; 130 for
    Ctrl-C."""
    return errors.run(_run, argv)


def _run(argv: Sequence[str] | None) -> int:
    args = options.parse(sys.argv[1:] if argv is None else argv)
    if args.command == "report":
        factors = [name.strip() for name in args.factors.split(",") if name.strip()]
        files = {"targets": args.targets, "target": args.target, "factors": factors, "title": args.title}
        print(sweep.write_report(args.results, args.out, **files))
        return 0
    problem = options.problem(args)
    if args.command == "landscape":
        losses = sweep.draw_landscape(
            args.checkpoints, problem, args.out, grid=options.grid(args), other=args.other, device=args.device
        ).losses
        if is_first_process():
            print(args.out)
            if wrong := losses[~losses.isfinite()].tolist():
                errors.say(f"{len(wrong)} of {losses.numel()} losses are not finite, the first is {wrong[0]}")
        return 0 if bool(losses.isfinite().all()) else errors.EXIT_FAILED
    measured = sweep.measure_checkpoints(
        args.checkpoints,
        problem,
        options.measures(args),
        json=args.json,
        csv=args.csv,
        device=args.device,
        quiet=args.quiet,
    )
    if is_first_process():
        print(measured.text())
        for remark in measured.remarks():
            errors.say(remark)
    return measured.exit_code
