"""The update of SGD, Adam and AdamW from the weights that the ascent has saved: the restore costs nothing.

State, its keys and its types are the base's own, which also makes it: the first step, and whatever is not known here,
is the base's after a restore by copy.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from sam_optim.kernels import tables, triton_update
from sam_optim.kernels import triton as body
from sam_optim.kernels.tables import ALIGNMENT, BLOCK, Uploaded
from sam_optim.kernels.triton import TYPES


class Descent:
    """The kernels' side of a base optimizer. Tables are kept as long as the tensors stay where they are."""

    def __init__(self, base: Optimizer):
        self.base = base
        self._numbers: Uploaded | None = None
        self._known: Any = None
        self._parts: list[dict[str, Any]] = []
        self._steps: Uploaded | None = None
        self._scalars: Any = None
        self._none_found: Any = None
        self.held: list[Any] = []  # what a captured graph reads, and nobody else any more
        self._is_captured = False

    def rows(self, saved: dict[Tensor, Tensor]) -> list[tuple[dict[str, Any], list[Tensor]]] | None:
        """Group and [w, where w is read, g, state ...] of each parameter; None where the base has to do it."""
        found = []
        for group in self.base.param_groups:
            if group.get("differentiable") or not group.get("fused"):
                return None
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state(group, self.base.state.get(p))
                if state is None or not body.fits(p, p.grad):
                    return None
                if any(x.dtype != p.dtype or not tables.same_layout(p, x) for x in state):
                    return None
                found.append((group, [p, saved.get(p, p), p.grad, *state]))
        updated = {row[0] for _, row in found}
        one_device = len({p.device for p in updated}) == 1
        return found if one_device and len(updated) == len(found) and updated.issuperset(saved) else None

    def _state(self, group: dict[str, Any], state: Any) -> list[Tensor] | None:
        if type(self.base) is SGD:
            if group["momentum"] == 0:
                return []
            buffer = None if state is None else state.get("momentum_buffer")
            return None if buffer is None else [buffer]
        names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))
        if not state or any(name not in state for name in names):
            return None
        step = state.get("step")
        if not isinstance(step, Tensor) or step.dtype != torch.float32 or not body.runs_on(step.device):
            return None
        return [state[name] for name in names]

    def run(
        self,
        rows: list[tuple[dict[str, Any], list[Tensor]]],
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """found_inf, grad_scale: as GradScaler gives them to a fused base, on the device."""
        device = rows[0][1][0].device
        self._is_captured |= tables.is_capturing(device)
        groups = [g for g in self.base.param_groups if any(g is group for group, _ in rows)]
        numbers = self._group_numbers(groups, device)
        if self._none_found is None:
            self._none_found = torch.zeros(1, device=device)
        found_inf = self._none_found if found_inf is None else found_inf.reshape(1)
        is_scaled = {"SCALED": grad_scale is not None}
        flags = found_inf, found_inf if grad_scale is None else grad_scale.reshape(1)
        kinds: dict[Any, list[int]] = {}
        where = [[tables.address(x) for x in row] for _, row in rows]
        for i, ((group, row), addresses) in enumerate(zip(rows, where, strict=True)):
            is_aligned = all(a % ALIGNMENT == 0 for a in addresses)
            kind = (row[0].dtype, row[2].dtype, is_aligned, len(row), *self._flags(group))
            kinds.setdefault(kind, []).append(i)
        order = [i for members in kinds.values() for i in members]
        of_group = [next(k for k, g in enumerate(groups) if g is rows[i][0]) for i in order]
        known = ([(kind, len(m)) for kind, m in kinds.items()], [rows[i][1][0].numel() for i in order], of_group)
        if known != self._known:
            self._make(kinds, rows, of_group, device)
            self._known = known
        with tables.on(device):
            if type(self.base) is not SGD:
                steps = self._steps.of([tables.address(self.base.state[rows[i][1][0]]["step"]) for i in order])  # type: ignore[union-attr]
                programs = -(-len(order) // 256)
                shared = (steps, self._of_group, numbers, found_inf, self._scalars, len(order), len(groups))
                tables.launch(triton_update.adam_steps, programs, *shared, BLOCK=256)
            first = 0
            for part, members in zip(self._parts, kinds.values(), strict=True):
                width = len(members)
                flat = [where[i][k] for k in range(len(where[members[0]])) for i in members]
                given = (part["addresses"].of(flat), part["layout"], part["group"], numbers, part["chunks"], *flags)
                programs = part["chunks"].shape[1]
                if type(self.base) is SGD:
                    tables.launch(
                        triton_update.sgd, programs, *given, width, len(groups), **part["constants"], **is_scaled
                    )
                else:
                    rest = (self._scalars, width, len(groups), first, len(order))
                    tables.launch(triton_update.adam, programs, *given, *rest, **part["constants"], **is_scaled)
                first += width
        torch.autograd.graph.increment_version([row[0] for _, row in rows])

    def _flags(self, group: dict[str, Any]) -> tuple[tuple[str, bool], ...]:
        if type(self.base) is SGD:
            found = {"MOMENTUM": group["momentum"] != 0, "NESTEROV": group["nesterov"]}
        else:
            decoupled = group.get("decoupled_weight_decay", type(self.base) is AdamW)
            found = {"DECOUPLED": decoupled, "AMSGRAD": group["amsgrad"]}
        return tuple((found | {"MAXIMIZE": group["maximize"]}).items())

    def _group_numbers(self, groups: list[dict[str, Any]], device: torch.device) -> Tensor:
        columns = []
        for g in groups:
            if type(self.base) is SGD:
                columns.append([g["lr"], g["momentum"], g["dampening"], g["weight_decay"], 0.0])
            else:
                columns.append([g["lr"], *g["betas"], g["weight_decay"], g["eps"]])
        flat = [column[row] for row in range(5) for column in columns]
        if self._numbers is None:
            self._numbers = Uploaded(torch.float64, device)
        there = self._numbers.of([0.0 if isinstance(x, Tensor) else float(x) for x in flat])
        for i, x in enumerate(flat):
            if isinstance(x, Tensor):
                there[i].copy_(x, non_blocking=True)
        return there

    def _make(self, kinds: dict[Any, list[int]], rows: list[Any], of_group: list[int], device: torch.device) -> None:
        if self._is_captured:
            self.held += [self._parts, self._scalars, self._steps]
        self._parts, at = [], 0
        for (w_type, g_type, is_aligned, _, *flags), members in kinds.items():
            wide = torch.float64 in (w_type, g_type)
            constants = {"G": TYPES[g_type], "W": TYPES[w_type], "WIDE": tl.float64 if wide else tl.float32}
            constants |= {"ALIGNED": is_aligned, "BLOCK": BLOCK} | dict(flags)
            sizes = [rows[i][1][0].numel() for i in members]
            part: dict[str, Any] = {"constants": constants, "addresses": Uploaded(torch.int64, device)}
            part["layout"] = tables.constant(sizes, torch.int64, device, self.held)
            part["group"] = tables.constant(of_group[at : at + len(members)], torch.int32, device, self.held)
            part["chunks"] = tables.constant(tables.chunks(sizes, BLOCK)[0], torch.int32, device, self.held)
            self._parts.append(part)
            at += len(members)
        self._of_group = tables.constant(of_group, torch.int32, device, self.held)
        self._steps = Uploaded(torch.int64, device)
        self._scalars = torch.zeros(2 * len(of_group), dtype=torch.float64, device=device)
