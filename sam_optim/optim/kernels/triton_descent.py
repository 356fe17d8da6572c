"""The update of SGD, Adam and AdamW from the weights that the ascent has saved: the restore costs nothing.

State, its keys and its types are the base's own, which also makes it: the first step, and whatever is not known here,
is the base's after a restore by copy.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from sam_optim.optim.kernels import tables, triton_update
from sam_optim.optim.kernels import triton as body
from sam_optim.optim.kernels.tables import ALIGNMENT, BLOCK, SPAN, Uploaded
from sam_optim.optim.kernels.triton import TYPES

STEPS = 256  # tensors of one program that counts their steps


@dataclass(slots=True)
class Update:
    """What the base is about to update, as long as all of it stays the same but for values and addresses.

    params: with a gradient. kinds: of the gradients. states: of one parameter after another, of each role in a group.
    options: of each group. moved, saved: what the ascent has moved, and where it has saved it. rows: of each parameter
    its group, and [w, where w is read, (the gradient's place), state ...]. flat: what the table of addresses has, by
    parts; aligned: of each address in it. steps: of each parameter, of Adam.
    """

    params: list[Tensor]
    kinds: list[Any]
    states: list[Tensor]
    options: list[Any]
    moved: list[Tensor]
    saved: list[Tensor]
    rows: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    parts: list[_Part] = field(default_factory=list)
    flat: list[Tensor] = field(default_factory=list)
    aligned: list[bool] = field(default_factory=list)
    steps_at: int = 0
    of_group: Any = None
    scalars: Any = None

    def is_for(self, params: list[Tensor], kinds: list[Any], states: list[Any], options: list[Any]) -> bool:
        return (
            _same(params, self.params)
            and kinds == self.kinds
            and _same(states, self.states)
            and options == self.options
        )


@dataclass(slots=True)
class _Part:
    """What one launch has: tensors of the same types, alignment and flags."""

    constants: dict[str, Any]
    members: list[int]
    start: int
    layout: Any
    group: Any
    chunks: Any
    spans: Any


class Descent:
    """The kernels' side of a base optimizer. Tables are kept as long as the tensors stay where they are."""

    def __init__(self, base: Optimizer):
        self.base = base
        self._is_sgd = type(base) is SGD
        self._update: Update | None = None
        self._numbers: Any = None
        self._addresses: Any = None
        self._slices: tuple[Tensor, list[Tensor]] | None = None
        self._none_found: Any = None
        self._found: Any = None
        self._progress: Any = None
        self.held: list[Any] = []  # what a captured graph reads, and nobody else any more
        self._is_captured = False

    def update(self, moved: list[Tensor], saved: list[Tensor]) -> Update | None:
        """Of all parameters that have a gradient, which must include what has `moved`; None where the base has to do
        it, after the weights have come back."""
        groups, params, states, options = [], [], [], []
        for k, group in enumerate(self.base.param_groups):
            if not group.get("fused") or group.get("differentiable"):
                return None
            own = [p for p in group["params"] if p.grad is not None]
            if own:
                groups.append((group, len(own)))
                options.append((k, len(own), self._flags(group)))
                params += own
                states += self._states(group, own)
        grads: list[Any] = [p.grad for p in params]
        try:
            kinds = [(type(g), g.dtype, g.stride()) for g in grads]
        except RuntimeError:  # of sparse gradients
            return None
        known = self._update
        is_known = known is not None and known.is_for(params, kinds, states, options)
        if not is_known or not (_same(moved, known.moved) and _same(saved, known.saved)):  # type: ignore[union-attr]
            made = Update(params, kinds, states, options, list(moved), list(saved))
            if not self._fill(made, groups):
                return None
            self._keep(known)
            self._update = known = made
        return known

    def _flags(self, group: dict[str, Any]) -> tuple[tuple[str, bool], ...]:
        """What the kernels are compiled for."""
        if self._is_sgd:
            found = {"MOMENTUM": group["momentum"] != 0, "NESTEROV": bool(group["nesterov"])}
        else:
            decoupled = group.get("decoupled_weight_decay", type(self.base) is AdamW)
            found = {"DECOUPLED": bool(decoupled), "AMSGRAD": bool(group["amsgrad"])}
        return tuple((found | {"MAXIMIZE": bool(group["maximize"])}).items())

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        if self._is_sgd:
            return ("momentum_buffer",) if group["momentum"] != 0 else ()
        return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []), "step")

    def _states(self, group: dict[str, Any], params: list[Tensor]) -> list[Any]:
        names = self._names(group)
        found = [self.base.state.get(p, {}) for p in params] if names else []
        return [state.get(name) for name in names for state in found]

    def _fill(self, made: Update, groups: list[tuple[dict[str, Any], int]]) -> bool:
        """Rows, and the launches for them. False where something is not known."""
        where = dict(zip(made.moved, made.saved, strict=True))
        states, params = iter(made.states), iter(made.params)
        for k, (group, count) in enumerate(groups):
            own = list(itertools.islice(params, count))
            by_name = {name: list(itertools.islice(states, count)) for name in self._names(group)}
            made.steps += by_name.pop("step", [])
            for i, p in enumerate(own):
                state = [x[i] for x in by_name.values()]
                if not body.fits(p, p.grad) or any(  # type: ignore[arg-type]
                    x is None or x.dtype != p.dtype or not tables.same_layout(p, x) for x in state
                ):
                    return False
                made.rows.append((k, [p, where.get(p, p), p, *state]))
        for step in made.steps:
            if not isinstance(step, Tensor) or step.dtype != torch.float32 or not body.runs_on(step.device):
                return False
        updated = set(made.params)
        if len({p.device for p in updated}) != 1 or len(updated) != len(made.params) or not updated.issuperset(where):
            return False
        self._make_parts(made)
        return True

    def _make_parts(self, made: Update) -> None:
        device = made.params[0].device
        by_kind: dict[Any, list[int]] = {}
        for i, (k, row) in enumerate(made.rows):
            found = tables.addresses([*row, made.params[i].grad])  # type: ignore[list-item]
            is_aligned = all(a % ALIGNMENT == 0 for a in found)
            kind = (row[0].dtype, made.kinds[i][1], is_aligned, len(row), *made.options[k][2])
            by_kind.setdefault(kind, []).append(i)
        order = [i for members in by_kind.values() for i in members]
        made.parts, made.flat = [], []
        for (w_type, g_type, is_aligned, num_roles, *flags), members in by_kind.items():
            wide = torch.float64 in (w_type, g_type)
            constants = {"G": TYPES[g_type], "W": TYPES[w_type], "WIDE": tl.float64 if wide else tl.float32}
            block = BLOCK // 2 if wide else BLOCK  # Adam in float64 would run out of registers
            constants |= {"ALIGNED": is_aligned, "BLOCK": block} | dict(flags)
            sizes = [made.rows[i][1][0].numel() for i in members]
            made.parts.append(
                _Part(
                    constants,
                    members,
                    len(made.flat),
                    self._constant(sizes, torch.int64, device),
                    self._constant([made.rows[i][0] for i in members], torch.int32, device),
                    self._constant(tables.chunks(sizes, block)[0], torch.int32, device),
                    self._constant(tables.chunks(sizes, SPAN * BLOCK)[0], torch.int32, device),
                )
            )
            made.flat += [made.rows[i][1][role] for role in range(num_roles) for i in members]
            made.flat += made.flat[-1:] * (len(made.flat) % 2)  # tables begin at 16 bytes, or compile once more
        made.steps_at = len(made.flat)
        made.flat += [made.steps[i] for i in order] if made.steps else []
        made.of_group = self._constant([made.rows[i][0] for i in order], torch.int32, device)
        made.scalars = torch.zeros(2 * len(order), dtype=torch.float64, device=device)
        made.aligned = [a % ALIGNMENT == 0 for a in self._found_addresses(made)]

    def _constant(self, values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return tables.constant(values, dtype, device, self.held)

    def _keep(self, known: Update | None) -> None:
        if self._is_captured and known is not None:
            self.held.append(known)

    def run(
        self,
        update: Update,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> None:
        """found_inf, grad_scale: as GradScaler gives them to a fused base, on the device. skipped: where there is no
        found_inf, counts the updates that are left out for a gradient that is inf or NaN, which is looked for."""
        device = update.params[0].device
        self._settle(device)
        self._is_captured |= tables.is_capturing(device)
        table = self._table(update)
        groups = [self.base.param_groups[k] for k, *_ in update.options]
        numbers = self._group_numbers(groups)
        with tables.on(device):
            if found_inf is not None:
                found_inf = found_inf.reshape(1)
            elif skipped is None:
                found_inf = self._none_found
            else:
                found_inf = self._look_through(update, table, skipped)
            is_scaled = {"SCALED": grad_scale is not None}
            flags = found_inf, found_inf if grad_scale is None else grad_scale.reshape(1)
            num = len(update.rows)
            if not self._is_sgd:
                shared = (table[-1], update.of_group, numbers, found_inf, update.scalars, num, len(groups))
                tables.launch(triton_update.adam_steps, -(-num // STEPS), *shared, BLOCK=STEPS)
            first = 0
            for part, addresses in zip(update.parts, table, strict=False):
                width = len(part.members)
                given = (addresses, part.layout, part.group, numbers, part.chunks, *flags)
                constants = part.constants | is_scaled
                programs = part.chunks.shape[1]
                if self._is_sgd:
                    tables.launch(triton_update.sgd, programs, *given, width, len(groups), **constants)
                else:
                    rest = (update.scalars, width, len(groups), first, num)
                    tables.launch(triton_update.adam, programs, *given, *rest, **constants)
                first += width
        torch.autograd.graph.increment_version(update.params)

    def _settle(self, device: torch.device) -> None:
        """Storage of its own on the device, also where the model has moved to another one."""
        if self._none_found is None or self._none_found.device != device:
            if self._is_captured:
                self.held += [self._numbers, self._addresses, self._none_found, self._found, self._progress]
            self._none_found, self._found = torch.zeros(1, device=device), torch.zeros(1, device=device)
            self._progress = torch.zeros(1, dtype=torch.int64, device=device)
            self._numbers, self._addresses = Uploaded(torch.float64, device), Uploaded(torch.int64, device)

    def _table(self, update: Update) -> list[Tensor]:
        """Addresses on the device: of each part, and of the steps."""
        found = self._found_addresses(update)
        if is_new := not self._addresses.has(found):
            aligned = [a % ALIGNMENT == 0 for a in found]
            if aligned != update.aligned:
                self._keep(update)
                self._make_parts(update)
                found = self._found_addresses(update)
        there = self._addresses.of(found)
        if is_new or self._slices is None or self._slices[0] is not there:
            starts = [*[part.start for part in update.parts], update.steps_at]
            self._slices = there, [there[start:] for start in starts]
        return self._slices[1]

    @staticmethod
    def _found_addresses(update: Update) -> list[int]:
        """Gradients are not held on to: the next pass needs their memory."""
        found = tables.addresses(update.flat)
        grads = tables.addresses([p.grad for p in update.params])  # type: ignore[misc]
        for part in update.parts:
            place = part.start + 2 * len(part.members)
            found[place : place + len(part.members)] = [grads[i] for i in part.members]
        return found

    def _look_through(self, update: Update, table: list[Tensor], skipped: Tensor) -> Tensor:
        """Whether any gradient is inf or NaN, on the device."""
        programs = sum(part.spans.shape[1] for part in update.parts)
        try:
            for part, addresses in zip(update.parts, table, strict=False):
                constants = {k: part.constants[k] for k in ("G", "WIDE", "ALIGNED")}
                given = (addresses, part.layout, part.spans, self._progress, self._found, skipped.reshape(1))
                sizes = {"SPAN": SPAN, "BLOCK": BLOCK}
                count = part.spans.shape[1]
                tables.launch(triton_update.nonfinite, count, *given, len(part.members), programs, **constants, **sizes)
        except BaseException:  # some have counted themselves, and no last one will come
            self._progress.zero_()
            raise
        return self._found

    def _group_numbers(self, groups: list[dict[str, Any]]) -> Tensor:
        columns = []
        for g in groups:
            if self._is_sgd:
                columns.append([g["lr"], g["momentum"], g["dampening"], g["weight_decay"], 0.0])
            else:
                columns.append([g["lr"], *g["betas"], g["weight_decay"], g["eps"]])
        flat = [column[row] for row in range(5) for column in columns]
        there = self._numbers.of([tables.IN_TENSOR if isinstance(x, Tensor) else float(x) for x in flat])
        for i, x in enumerate(flat):
            if isinstance(x, Tensor):
                there[i].copy_(x, non_blocking=True)
        return there


def _same(found: list[Any], known: list[Any]) -> bool:
    return len(found) == len(known) and all(map(operator.is_, found, known))
