"""What stays outside of torch.compile's graphs, and what of it is compiled again.

Dynamo silently drops `self.x = ...` on an Optimizer in a frame that also has tensor operations (torch 2.13, 2.15), and
what is not remembered of a perturbation is never taken back. So a step runs outside of Dynamo with all that it calls,
closures too, as torch's LBFGS does; but an update of torch.optim goes to the compiler of the caller, if there is one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

try:
    from torch._C._dynamo.eval_frame import set_eval_frame
except ImportError:  # private: without it all of a step runs uncompiled
    set_eval_frame = None  # type: ignore[assignment]

P = ParamSpec("P")
R = TypeVar("R")

_caller = threading.local()


def outside(function: Callable[P, R]) -> Callable[P, R]:
    """Never traced, and nothing that it calls is, but by `inside`."""
    if set_eval_frame is None:
        return torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        compiler = set_eval_frame(None)
        outer = getattr(_caller, "compiler", None)
        try:
            _caller.compiler = outer if compiler is None else compiler
            return function(*args, **kwargs)
        finally:
            _caller.compiler = outer
            set_eval_frame(compiler)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = "weights that move between two passes are no part of a graph"  # type: ignore[attr-defined]
    return call


def inside(function: Callable[P, R]) -> Callable[P, R]:
    """As whoever called the outermost `outside`: compiled where that is."""
    compiler: Any = getattr(_caller, "compiler", None)
    if set_eval_frame is None or compiler is None:
        return function

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        set_eval_frame(compiler)
        try:
            return function(*args, **kwargs)
        finally:
            set_eval_frame(None)

    return call


@functools.cache
def prepare() -> None:
    """To be called before Dynamo can meet a function that is `outside`: or it would look into the wrapper, and warn.

    Not on import: Dynamo takes a second to import, which torch.optim does when the first optimizer is made.
    """
    try:
        from torch._dynamo.eval_frame import skip_code
    except ImportError:
        return
    skip_code(outside(prepare).__code__)
