"""What sharpness in a ball costs, compared with the algorithm of arXiv:2302.07011, written again from its description.

The published algorithm, for each batch: worst case, T iterations of Auto-PGD, each with a forward and backward pass for
the gradient, a projection (by bisection where p = 2 and T = |w|), and another forward pass for the loss; average case,
one forward pass for each draw of noise. All of it in eval mode, the weights with the strides that they come in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.rows import Problem, Row
from sam_optim import Ball, Loss, average_sharpness, worst_case_sharpness

STEPS = 20
DRAWS = 20
BAR = 0.65
MOST_BISECTIONS = 1000  # the published search has no limit, and need not end in float32
WORST = {"p = inf": (math.inf, 0.005), "p = 2": (2, 0.25)}  # rho of T = |w|, in the range of the paper's for ResNets
AVERAGE_RHO = 0.05  # the smallest of the paper's for ResNets

Weights = list[Tensor]


def rows(problem: Problem) -> list[Row]:
    """Worst case for both norms and average case, T = |w|; the average also to the standard error of the published one.

    That row has as many draws as the variance of both in one run asks for; its bar is that of the measure.
    """
    compared = []
    for name, (norm, rho) in WORST.items():
        ball = Ball(rho, norm=norm, adaptive=True, eta=0.0)
        compared.append(Row(f"worst case, {name}, {STEPS} steps", *_worst(problem, ball), BAR))
    ball = Ball(AVERAGE_RHO, adaptive=True, eta=0.0)
    compared.append(Row(f"average case, {DRAWS} draws", *_average(problem, ball, DRAWS), None))
    num = draws_for_equal_error(problem, ball)
    compared.append(Row(f"average case, equal error: {num} draws for {DRAWS}", *_average(problem, ball, num), BAR))
    return compared


def _worst(problem: Problem, ball: Ball) -> tuple[Callable[[], Any], Callable[[], Any]]:
    loss, model = _loss(problem), problem.make_model().eval()
    return (
        lambda: worst_case_sharpness(loss, ball, num_steps=STEPS, num_restarts=1),
        lambda: published_worst_case(model, problem.criterion, problem.batches, ball.rho, norm=ball.norm),
    )


def _average(problem: Problem, ball: Ball, num_samples: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    loss, model = _loss(problem), problem.make_model().eval()
    return (
        lambda: average_sharpness(loss, ball, num_samples=num_samples),
        lambda: published_average_case(model, problem.criterion, problem.batches, ball.rho),
    )


def _loss(problem: Problem) -> Loss:
    return Loss(problem.make_model(), problem.criterion, problem.batches)


def draws_for_equal_error(problem: Problem, ball: Ball) -> int:
    """How many draws per batch have the standard error over draws of `DRAWS` published ones, at least 4."""
    sizes = torch.tensor([len(y) for _, y in problem.batches], dtype=torch.float64)
    published = published_average_case(problem.make_model().eval(), problem.criterion, problem.batches, ball.rho)
    published_variance = float((published.var(dim=1) / DRAWS) @ (sizes / sizes.sum()).square())
    own_variance = average_sharpness(_loss(problem), ball, num_samples=DRAWS).details["stderr_draws"] ** 2
    return max(4, math.ceil(DRAWS * own_variance / published_variance))


@torch.no_grad()
def published_average_case(
    model: nn.Module, criterion: Any, batches: list[Any], rho: float, *, num_draws: int = DRAWS
) -> Tensor:
    """l_b(w + rho |w| z) - l_b(w) of every draw, (num_batches, num_draws); fresh noise for each batch."""
    noisy, params = copy.deepcopy(model), list(model.parameters())
    rises = torch.empty(len(batches), num_draws, dtype=torch.float64)
    for b, (x, y) in enumerate(batches):
        base = _loss_and_error(model, criterion, x, y)[0]
        for i in range(num_draws):
            noise = [torch.randn_like(w) for w in params]
            for p, w, z in zip(noisy.parameters(), params, noise, strict=True):
                p.data = w + rho * z * w.abs()
            rises[b, i] = _loss_and_error(noisy, criterion, x, y)[0] - base
    return rises


def published_worst_case(
    model: nn.Module, criterion: Any, batches: list[Any], rho: float, *, norm: float, num_steps: int = STEPS
) -> float:
    """The mean over batches of the best rise of Auto-PGD in {||d / |w| ||_p <= rho}, from d = 0."""
    params = list(model.parameters())
    clean = [w.detach().clone() for w in params]
    scale = [w.abs() for w in clean]
    schedule, rises = _schedule(num_steps), []
    for x, y in batches:
        base, _ = _loss_and_error(model, criterion, x, y)
        best, best_weights, best_before = base, copy.deepcopy(model.state_dict()), base
        d, d_before = [torch.zeros_like(w) for w in clean], [torch.zeros_like(w) for w in clean]
        step = step_before = 2 * rho
        last, risen = 0, 0
        for i in range(num_steps):
            previous = [a.clone() for a in d]
            for p in params:
                p.grad = None
            criterion(model(x), y).backward()
            with torch.no_grad():
                z = _projected(_stepped(params, d, scale, step, norm), scale, rho, norm)
                d = [0.75 * a + 0.25 * b for a, b in zip(z, d_before, strict=True)]
                for p, w, a in zip(params, clean, d, strict=True):
                    p.data = w + a
            d_before = previous
            value, _ = _loss_and_error(model, criterion, x, y)
            torch.cat([a.flatten() for a in d]).norm().item()  # reported with the result
            if value > best:
                best, best_weights, risen = value, copy.deepcopy(model.state_dict()), risen + 1
            if i in schedule:
                stalled = risen < 0.75 * (i - last) or (step_before == step and best_before == best)
                step_before, best_before, last, risen = step, best, i, 0
                if stalled:
                    step /= 2
                    model.load_state_dict(best_weights)
        rises.append(best - base)
        with torch.no_grad():
            for p, w in zip(params, clean, strict=True):
                p.data = w.clone()
                p.grad = None
    return sum(rises) / len(rises)


def _stepped(params: Weights, d: Weights, scale: Weights, step: float, norm: float) -> Weights:
    if norm == math.inf:
        return [a + step * p.grad.sign() * s for p, a, s in zip(params, d, scale, strict=True)]  # type: ignore[union-attr]
    length = sum(p.grad.norm() ** 2 for p in params) ** 0.5  # type: ignore[union-attr]
    return [a + step / (length + 1e-12) * p.grad * s for p, a, s in zip(params, d, scale, strict=True)]


def _projected(d: Weights, scale: Weights, rho: float, norm: float) -> Weights:
    """Clipped, or the nearest point of the ellipsoid, d / (1 + 2 m / |w|^2) with m found by bisection."""
    if norm == math.inf:
        return [torch.max(torch.min(a, rho * s), -rho * s) for a, s in zip(d, scale, strict=True)]

    def length(d: Weights) -> Tensor:
        return sum((((a / s) ** 2).sum() for a, s in zip(d, scale, strict=True)), start=torch.zeros(())) ** 0.5

    projected, reached = d, length(d)
    if not reached > rho:
        return projected
    multiplier, low, high, limit = 0.1, 0.0, 10.0, 10.0
    for _ in range(MOST_BISECTIONS):
        if (reached - rho).abs() <= 1e-5:
            break
        projected = [a / (1 + 2 * multiplier / s**2) for a, s in zip(d, scale, strict=True)]
        reached = length(projected)
        if reached > rho:
            multiplier, low = (multiplier + high) / 2, multiplier
        else:
            multiplier, high = (low + multiplier) / 2, multiplier
        if limit - high < 1e-2:
            limit, high = 2 * limit, 2 * high
    return projected


def _schedule(num_steps: int) -> set[int]:
    p, checkpoints = [0, 0.22], [0, math.ceil(0.22 * num_steps)]
    while checkpoints[-1] < num_steps and checkpoints[-1] != checkpoints[-2]:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
        checkpoints.append(math.ceil(p[-1] * num_steps))
    return set(checkpoints[1:])


@torch.no_grad()
def _loss_and_error(model: nn.Module, criterion: Any, x: Tensor, y: Tensor) -> tuple[float, float]:
    outputs = model(x)
    return criterion(outputs, y).item(), (outputs.argmax(1) != y).float().mean().item()
