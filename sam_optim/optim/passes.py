"""Whether the second pass ran what the first one ran: a forward of its own, and all micro-batches."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sam_optim.optim.transaction import ModelCalls

# torch's own, under backward() and grad(): its frame has the tensors they start from; without it nothing is looked for
_ENGINE = getattr(getattr(torch.autograd.graph, "_engine_run_backward", None), "__code__", None)


_USED_GRAPH = ("modified by an inplace operation", "backward through the graph a second time")  # in torch's messages
_NEW_GRAPHS = (
    "SAM computes a loss twice, each time with a new graph: run the model inside the closure, or both before the "
    "perturbed pass and in it, on the same data. That is fake = G(noise) in a GAN, log-probabilities of actions, "
    "outputs for a second loss; a hidden state starts both passes detached. retain_graph=True is no remedy"
)


def explain_used_graph(error: BaseException) -> None:
    """Adds to torch's error of a graph that is used after the weights moved, or twice, what to do about it."""
    is_used = isinstance(error, RuntimeError) and any([words in str(error) for words in _USED_GRAPH])
    if is_used and _NEW_GRAPHS not in getattr(error, "__notes__", ()):
        error.add_note(_NEW_GRAPHS)


class Graphs:
    """Whether a backward goes from a graph that is older than this to the parameters.

    Torch itself sees it where weights are saved for the backward: not in the first layer. The nodes are those that the
    backward in the same thread started from, and a node is older if its number is less. Threads number their own nodes,
    so what a `DataParallel` has made says nothing.
    """

    def __init__(self, params: Sequence[Tensor]):
        self.are_old = False
        self._params = params
        self._num_nodes = torch._C._autograd._get_sequence_nr()
        self._thread = threading.get_ident()
        self._task = -1
        for p in {id(p): p for p in (params[0], params[-1])}.values():
            weakref.finalize(self, p.register_hook(ModelCalls(self)).remove)

    def called(self, grad: Tensor) -> None:
        if self._task == torch._C._current_graph_task_id():
            return
        self._task = torch._C._current_graph_task_id()
        frame = sys._current_frames().get(self._thread)
        while frame is not None and frame.f_code is not _ENGINE:
            frame = frame.f_back
        if frame is not None:
            self._search(
                [x.grad_fn for x in frame.f_locals.get("t_outputs", ()) if isinstance(x, Tensor) and x.grad_fn]
            )

    def _search(self, roots: list[Any]) -> None:
        ids = {*map(id, self._params)}
        ages = dict.fromkeys(roots, False)  # whether an old node leads to it
        waiting = list(ages)
        is_reached = False
        while waiting:
            node = waiting.pop()
            if "Broadcast" in node.name():
                return
            if id(getattr(node, "variable", None)) in ids:
                is_reached = is_reached or ages[node]
                continue
            age = ages[node] or node._sequence_nr() < self._num_nodes
            for child, _ in node.next_functions:
                if child is not None and ages.get(child) is not True and (child not in ages or age):
                    ages[child] = age
                    waiting.append(child)
        self.are_old = self.are_old or is_reached


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
                "every micro-batch in both, or the two passes of each in `with optimizer.microbatch():`; what another "
                "loss has left in the gradients (that of a GAN's G in D) goes with zero_grad() before the first pass",
                stacklevel=7,
            )
