"""SAM written out with torch alone, from the formula: the truth that every framework's run is compared with."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

LOSS = nn.CrossEntropyLoss()
FEATURES, CLASSES = 6, 3


def network(seed=0, *, dropout=0.3):
    """BatchNorm and dropout: what a second pass disturbs where nobody takes care."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(dropout), nn.Linear(20, CLASSES)
        )


def examples(num=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, FEATURES, generator=generator), torch.randint(CLASSES, (num,), generator=generator)


def batches(num=8, size=8):
    x, y = examples(num * size)
    return list(zip(x.split(size), y.split(size), strict=True))


def norm_of(grads):
    """||g||_2, in the precision of g; a loss scale that is a power of two does not change its digits."""
    return float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])))


@torch.no_grad()
def moved(model, *, rho, eta=None, groups=None):
    """A copy of the model at w + e, e = rho T^2 g / ||T g||_2, T = |w| + eta in groups where that is given; NaN where
    the norm is not finite.

    groups: lists of (parameters, eta); one norm runs over them all. Parameters without a gradient stay.
    """
    groups = [(list(model.parameters()), eta)] if groups is None else groups
    there = copy.deepcopy(model)
    twin = {id(p): q for p, q in zip(model.parameters(), there.parameters(), strict=True)}
    plan = []
    for params, eta in groups:
        held = [p for p in params if p.grad is not None]
        t = [None if eta is None else p.abs() + eta for p in held]
        plan.append((held, t, [p.grad if s is None else s * p.grad for p, s in zip(held, t, strict=True)]))
    norms = [norm_of(scaled) for _, _, scaled in plan if scaled]
    norm = math.hypot(*norms)
    if norm > 0 or math.isnan(norm):
        factor = rho / norm if norm < math.inf else math.nan
        for held, t, scaled in plan:
            for p, s, g in zip(held, t, scaled, strict=True):
                q = twin[id(p)]
                q.add_(g if s is None else g * s, alpha=factor)
    for q in there.parameters():
        q.grad = None
    return there


def add_sam_gradient(model, loss_of, *, rho, scale=1.0, **where):
    """p.grad += the gradient at w + e of scale * loss_of(model). Returns the loss at w."""
    earlier = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    loss = loss_of(model)
    (loss * scale).backward()
    there = moved(model, rho=rho, **where)
    (loss_of(there) * scale).backward()
    for p, q, g in zip(model.parameters(), there.parameters(), earlier, strict=True):
        p.grad = q.grad if g is None else g if q.grad is None else g + q.grad
    return loss.detach()


def seed_step(k):
    """Frameworks draw numbers of their own between steps, so that the k-th step has a seed of its own everywhere."""
    torch.manual_seed(1000 + k)


def train(
    model,
    optimizer,
    data,
    *,
    rho,
    accumulate=1,
    divide=None,
    clip=None,
    scale=1.0,
    autocast=None,
    loss_of=lambda m, x, y: LOSS(m(x), y),
    after=lambda: None,
    **where,
):
    """The plain loop: each micro-batch has its own perturbation, and their gradients are added. Returns the losses.

    divide: what the loss of a micro-batch is divided by, `accumulate` where nothing is said. scale: of a GradScaler,
    which skips steps whose gradient is not finite.
    """
    divide, losses = accumulate if divide is None else divide, []
    for i, (x, y) in enumerate(data):
        if i % accumulate == 0:
            seed_step(i // accumulate)

        def loss_at(m, x=x, y=y):
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = loss_of(m, x, y)
            return loss / divide

        losses.append(float(add_sam_gradient(model, loss_at, rho=rho, scale=scale, **where) * divide))
        if (i + 1) % accumulate == 0:
            for p in model.parameters():
                p.grad = None if p.grad is None else p.grad / scale
            if scale != 1.0 and not all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters()):
                optimizer.zero_grad()
                after()
                continue
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            after()
    return losses


class Overflows:
    """The loss, but infinite at some calls; a batch makes two, at w and at w + e."""

    def __init__(self, *calls):
        self._calls, self._made = calls, 0

    def __call__(self, model, x, y):
        self._made += 1
        return LOSS(model(x), y) * (float("inf") if self._made - 1 in self._calls else 1.0)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def largest_difference(model, other):
    """max |dw| over parameters and buffers, in float64; nan where there is one."""
    pairs = zip(tensors(model), tensors(other), strict=True)
    return float(torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs]).max())


def tensors(model):
    return [*(p.detach() for p in model.parameters()), *model.buffers()]
