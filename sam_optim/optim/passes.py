"""Whether the second pass ran what the first one ran: a forward of its own, and all micro-batches."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sam_optim.optim.transaction import ModelCalls


class Passes:
    """Compares the two passes of a step.

    That a backward ran through the graph of the first pass is seen in the first step: no node of a graph has been
    created in between, and the gradients are equal bit for bit. (Torch itself sees it where weights are saved for the
    backward: in all models of more than one layer.) Fewer backwards are suspected where p.grad was written to less
    often, which costs nothing to read, and counted in the step after that.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, int] | None = None
        self._at_w: list[tuple[Tensor, Tensor]] = []
        self._num_nodes = 0
        self._count: PassCount | None = None
        self._has_counted = False

    def turn(self, used: Sequence[Tensor], *, looks: bool) -> None:
        """Between the passes. used: the parameters with a gradient, still that at w; looks: in a first step."""
        if not used:
            return
        self._last = used[-1], used[-1].grad._version  # type: ignore[union-attr]
        ends = (used[:1] if used[0] is used[-1] else [used[0], used[-1]]) if looks else []
        self._at_w = [(p, p.grad) for p in ends if type(p.grad) is Tensor and not p.grad.is_sparse]
        self._num_nodes = torch._C._autograd._get_sequence_nr()
        if self._count is not None:
            self._count.turn()

    def end(self, modules: Iterable[nn.Module], *, has_come: bool) -> None:
        """After the second pass. modules: those to count the data of; has_come: a gradient, by a backward."""
        last, at_w, self._last, self._at_w = self._last, self._at_w, None, []
        num_nodes = torch._C._autograd._get_sequence_nr() - self._num_nodes
        # a factor on the loss is a node; with one parameter, a loss may be no more than that
        has_old_graph = has_come and num_nodes < len(at_w)
        if has_old_graph and all([p.grad is not None and torch.equal(p.grad, g) for p, g in at_w]):
            raise RuntimeError(
                "the second pass has run backward through the graph of the first, and its gradient is that at w: run "
                "the model again in the perturbed pass, or in the closure"
            )
        if self._count is not None:
            self._count.compare()
            self._count = None
        elif last is not None and not self._has_counted:
            p, num_written = last
            if p.grad is not None and p.grad._version < num_written:
                self._has_counted, self._count = True, PassCount(p, modules)


class PassCount:
    """Counts the backwards of each pass that reach a parameter, and the entries of the tensors that modules get."""

    def __init__(self, p: Tensor, modules: Iterable[nn.Module]):
        self._p = p
        self._first: list[int] = []
        self._entries: list[int] = []  # of each backward
        self._entries_so_far = 0
        calls = ModelCalls(self)
        hooks = [m.register_forward_pre_hook(calls, with_kwargs=True) for m in modules]
        for handle in (*hooks, p.register_hook(ModelCalls(self))):
            weakref.finalize(self, handle.remove)

    def called(self, *args: Any) -> None:
        """By a hook: a module with its inputs, or the parameter with a gradient."""
        if len(args) > 1:
            tensors = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor)]
            self._entries_so_far += sum([x.numel() for x in tensors]) if torch.is_grad_enabled() else 0
            return
        if self._p.grad is None or not self._p.grad.count_nonzero():  # what came before has been cleared
            self._entries = []
        self._entries.append(self._entries_so_far)
        self._entries_so_far = 0

    def turn(self) -> None:
        self._first, self._entries, self._entries_so_far = self._entries, [], 0

    def compare(self) -> None:
        first, second = self._first, self._entries
        if len(first) > len(second) > 0 and sum(first) > sum(second):
            warnings.warn(
                f"the first pass has run {len(first)} backwards and the second {len(second)}, on "
                f"{sum(second) / sum(first):.0%} of its data, and the step uses only the gradients of the second: run "
                "every micro-batch in both, or the two passes of each in `with optimizer.microbatch():`",
                stacklevel=7,
            )
