"""What the gradients of single batches say about each other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.core.random import Stream
from sam_optim.core.results import Estimate
from sam_optim.loss import Loss
from sam_optim.measures.conjugate_gradient import Solution, conjugate_gradient, damped_share
from sam_optim.measures.gram import (
    BatchGradients,
    cosines,
    gram_matrix,
    inner_products,
    jackknife,
    pair_weights,
)
from sam_optim.measures.shared import (
    Progress,
    Ticks,
    batch_weights,
    checked,
    estimate,
    flat_product,
    settings,
    student_half_width,
)

METRICS = ("euclidean", "fisher")
DAMPING = 1e-3
INVARIANT = Ball(0.0, adaptive=True, eta=0.0)
SHARE_TOL = 1e-3  # of each probe of the effective dimension, relative


@checked
def gradient_regret(
    loss: Loss,
    *,
    metric: str = "euclidean",
    ball: Ball | ProductBall | None = None,
    damping: float | None = None,
    tol: float = 1e-5,
    max_products: int = 1000,
    num_probes: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """The regret of one batch about a small step that is best for another.

        R / eps = E ||g_2|| (1 - cos(g_1, g_2)),   g_1, g_2: gradients of two different batches

    To first order in eps: step to the minimum of l_1 in a ball of radius eps around w, and compare l_2 there with its
    own minimum in the ball. The ball is

        "euclidean"    ||T^-1 d||^2 <= eps^2                          norms and inner products of T g
        "fisher"       d^T G d + damping ||T^-1 d||^2 <= eps^2        those of g in (G + damping T^-2)^-1

    with G the Gauss-Newton matrix of the whole loss, for cross-entropy the Fisher matrix: d^T G d is twice the KL
    divergence to leading order. T = 1 without a `ball`. Where g_1 = 0 the step is 0: the formula with a cosine of 0.

    G has directions without curvature, so the value depends on the damping, and with T = 1 it changes with the
    parametrization as far as the damping matters. With T = |w|, `Ball(0.0, adaptive=True, eta=0.0)`, neither metric
    changes under any rescaling of single weights by positive factors that leaves the function as it is (between ReLU
    layers, before normalization), nor under permutations; a weight that is 0 does not move. So that is the T of the
    damping where neither `ball` nor `damping` is given.

    Args:
        loss: L, with two batches or more; the regret depends on their size m. Pairs count by their numbers of examples.
        metric: "euclidean" or "fisher".
        ball: its T; its radius and norm do not matter.
        damping: in units of G (or of T G T, with a ball); only for "fisher", as are the next three. None is 1e-3, and
            T = |w| without a `ball`.
        tol: of the residual of each solve by conjugate gradients, relative to the gradient.
        max_products: of G with a vector, for each solve.
        num_probes: random vectors that estimate the effective dimension, one solve each; 0 leaves it out.
        seed: of the probes. The regret itself uses all pairs and draws nothing.
        progress: called with (gradients and products done, the most that there can be); a solve that needs fewer than
            max_products skips the rest.

    Returns:
        `value` in units of L per unit of w (of T with a ball; "fisher": of the square root of L). `stderr` is a
        jackknife over batches, because pairs share them; nan for two. `details`:
        `mean_norm` E||g||, `root_mean_square_norm` sqrt(tr E g g^T) (not less, by Jensen), `gradient_norm` of the whole
        loss, `norms` of each batch; `mean_cosine` over pairs; `product_of_means`, E||g|| (1 - E cos), and `covariance`,
        the rest of the value, which norms and cosines owe to each other; `rank`, of the gradients' Gram matrix.
        "fisher": `damping`; `residuals` and `num_products` of each solve; `effective_dimension`
        tr G (G + damping T^-2)^-1, the number of directions in which G outweighs the damping, and its `stderr`.

    Raises:
        ValueError: fewer than two batches, an unknown metric, damping <= 0, tol not between 0 and 1.

    Memory: "euclidean" holds 1 GiB of gradients at most, and goes through the data once for each GiB that they have.
    "fisher" holds the gradients of all batches, and five vectors more.

    Source: F. Huszar, "The Generalization Mystery: Sharp vs Flat Minima" (2018), with the update on the KL ball.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be 'euclidean' or 'fisher', got {metric!r}")
    _check_batches(loss, "the regret compares batches")
    if metric == "fisher" and ball is None and damping is None:
        ball = INVARIANT
    damping = DAMPING if damping is None else damping
    if not damping > 0:
        raise ValueError(f"damping must be > 0, got {damping}")
    if max_products < 1 or num_probes < 0:
        raise ValueError(f"max_products must be >= 1 and num_probes >= 0, got {max_products} and {num_probes}")
    scales = None if ball is None else ball.scales(loss.params)
    options: dict[str, Any] = {"metric": metric, "ball": ball, "seed": seed}
    if metric == "euclidean":
        return _regret(gram_matrix(loss, scales=scales, progress=progress), loss, options, [], {})
    options |= {"damping": damping, "tol": tol, "max_products": max_products, "num_probes": num_probes}
    most = max_products + 1  # of one solve: the residual is computed again
    tick = Ticks(progress, loss.num_batches + (loss.num_batches + num_probes) * most)
    (gradients,) = BatchGradients(loss, scales, budget=1 << 62).parts(tick)
    solutions, rows, shares = [], [], []
    stream = Stream(seed)
    with flat_product(loss, ball, "ggn", damping=damping) as damped:

        def product(v: Tensor) -> Tensor:
            tick()
            return damped(v)

        for i, g in enumerate(gradients, start=1):
            solution = conjugate_gradient(product, g, tol=tol, limit=max_products)
            rows.append(inner_products([solution.x], gradients))
            solution.x = g[:0]  # one solution at a time
            solutions.append(solution)
            tick.to(loss.num_batches + i * most)
        for i in range(1, num_probes + 1):
            z = stream.rademacher_like(gradients[0])
            shares.append(damped_share(product, z, damping, tol=SHARE_TOL, limit=max_products))
            tick.to(loss.num_batches + (loss.num_batches + i) * most)
    gram = torch.cat(rows)
    details = {
        "damping": damping,
        "residuals": [s.residual for s in solutions],
        "num_products": [s.num_products for s in solutions],
    }
    return _regret((gram + gram.T) / 2, loss, options, solutions, details | _effective_dimension(shares))


@checked
def gradient_coherence(
    loss: Loss, *, ball: Ball | ProductBall | None = None, progress: Progress | None = None
) -> Estimate:
    """How far the gradients of different batches point the same way.

        C = E cos(g_1, g_2),   g_1, g_2: gradients of two different batches

    1 where all batches agree, 0 for gradients that are orthogonal on average, and not below -1 / (B - 1) for B batches
    of one size with gradients of one length. It grows with the size m of the batches, which average the noise away.

    Args:
        loss: L, with two batches or more. Pairs count by their numbers of examples.
        ball: its T, for the gradients T g in relative units of the weights; radius and norm do not matter.
        progress: called with (gradients done, total).

    Returns:
        `value` between -1 and 1, without units. `stderr`: a jackknife over batches; nan for two. `details`:
        `mean_norm` E||g||, `root_mean_square_norm` sqrt(tr E g g^T), `gradient_norm` of the whole loss, `norms`;
        `agreement`, E<g_1, g_2> / E||g||^2 over pairs, in which long gradients count for more; `share_positive`, of
        pairs that have a positive product; `m_coherence`, B ||E g||^2 / E||g||^2: how many of the B batches profit from
        a step along one of them (1 if orthogonal, B if equal), the inverse of gradient diversity;
        `signal_to_noise`, the mean over parameters of (E g)^2 / Var g with the variance over batches (parameters
        without variance left out). The last is biased upward by about 1 / B.

    Raises:
        ValueError: fewer than two batches.

    Source: the mean cosine is the stiffness of arXiv:1901.09491, there between examples; m-coherence:
    arXiv:2008.01217; signal to noise of single parameters: arXiv:2001.07384.
    """
    _check_batches(loss, "coherence compares batches")
    gradients = BatchGradients(loss, None if ball is None else ball.scales(loss.params))
    tick, p = Ticks(progress, gradients.num_gradients), batch_weights(loss)
    gram = torch.zeros(len(p), len(p), dtype=torch.float64)
    ratios, counted = 0.0, 0
    for rows in gradients.parts(tick):
        gram += inner_products(rows, rows)
        total, num = _signal_to_noise(rows, p)
        ratios, counted = ratios + total, counted + num

    pairs, second = pair_weights(p), float(p @ gram.diagonal())
    value, agreement = _mean_cosine(gram, p), float((pairs * gram).sum() / pairs.sum())
    squared_mean = max(float(p @ gram @ p), 0.0)
    return estimate(
        loss,
        value,
        jackknife(_mean_cosine, gram, loss.batch_weights),
        num_samples=len(p),
        details=_norms(gram, p)
        | {
            "agreement": agreement / second if second else 0.0,
            "share_positive": float((pairs * (gram > 0)).sum() / pairs.sum()),
            "m_coherence": len(p) * squared_mean / second if second else 0.0,
            "signal_to_noise": ratios / counted if counted else math.nan,
        },
        settings=settings("gradient_coherence", loss, ball=ball),
    )


@checked
def gradient_noise_scale(
    loss: Loss, *, ball: Ball | ProductBall | None = None, sampled: bool = False, progress: Progress | None = None
) -> Estimate:
    """The batch size at which the noise of the gradient is as large as the gradient.

        B_simple = tr Sigma / ||G||^2,   Sigma: covariance of the gradients g_i of single examples, G: their mean

    From the gradients g_b of the batches, with their sum of squares c = sum_b n_b ||g_b - g||^2, g = grad L:

        sampled=False    G = g,  tr Sigma = c (N - 1) / (N (B - 1))             the examples are all that there are
        sampled=True     ||G||^2 = ||g||^2 - tr Sigma / N,  tr Sigma = c / (B - 1)     they are a sample of many more

    The first is the noise of batches drawn from this data set; with batches of one example it is exact. The second
    speaks of the distribution that the data were drawn from. Its estimates of ||G||^2 and tr Sigma are unbiased (their
    ratio is not); near a minimum of L that of ||G||^2 may be negative, because g vanishes and G does not.

    Args:
        loss: L, with batches of any sizes; the more batches, the better tr Sigma is known. One batch is taken apart
            into its examples, each with a gradient of its own.
        ball: its T, for gradients T g; radius and norm do not matter.
        sampled: which of the two.
        progress: called with (gradients done, total).

    Returns:
        `value` in examples. `stderr`: sampled=False: from the spread of tr Sigma over random partitions of these data
        into batches, 2 tr(Sigma^2) (1 - 1/m) / (B - 1), 0 for batches of one example; sampled=True: a jackknife over
        batches. Both nan for two batches. `details`: `trace` tr Sigma and `squared_gradient` ||G||^2 in squared units
        of the gradient; `effective_rank`, (tr Sigma)^2 / tr Sigma^2; `mean_norm`, `root_mean_square_norm`,
        `gradient_norm`, `norms` as in `gradient_regret`. `converged` is False and the value nan where ||G||^2 <= 0;
        `interval` is symmetric in the logarithm, by a jackknife over batches; None for two, and with sampled=True where
        ||G||^2 <= 0 without one of them. Where ||G||^2 is below its noise, tr Sigma / N, it may be too short.

    Raises:
        ValueError: one example, or one batch with batch statistics, where examples have no gradients of their own.

    Source: arXiv:1812.06162.
    """
    if loss.num_batches == 1 and loss.num_examples > 1 and not loss.batch_statistics:
        loss = loss.split(1)
    _check_batches(loss, "the noise is seen between batches")
    scales = None if ball is None else ball.scales(loss.params)
    gram, p = gram_matrix(loss, scales=scales, progress=progress), batch_weights(loss)
    sizes = torch.tensor(loss.batch_weights, dtype=torch.float64)
    if loss.settings()["weights"] != "counted labels":  # their number; other weights have no unit
        sizes *= loss.num_examples / sizes.sum()
    trace, squared = _noise(gram, sizes, sampled)
    second_moment = _trace_of_square(gram, sizes)
    value = trace / squared if squared > 0 else math.nan
    if sampled:
        stderr = jackknife(lambda gram, sizes: _ratio(*_noise(gram, sizes, sampled=True)), gram, loss.batch_weights)
    else:
        variance = 2 * second_moment * _unseen(sizes) / (len(p) - 1)
        stderr = math.sqrt(variance) / squared if squared > 0 else math.nan
    why = None
    if math.isfinite(trace) and not squared > 0:
        why = (
            "the squared gradient, less its noise, is not positive: more examples are needed to tell it from 0"
            if sampled
            else "the gradient of the whole loss is 0"
        )
    result = estimate(
        loss,
        value,
        stderr,
        num_samples=len(p),
        reason=why,
        details=_norms(gram, p)
        | {
            "trace": trace,
            "squared_gradient": squared,
            "effective_rank": trace**2 / second_moment if second_moment > 0 else math.nan,
        },
        settings=settings("gradient_noise_scale", loss, ball=ball, sampled=sampled),
    )
    return replace(result, interval=_interval_of_ratio(value, gram, sizes, sampled) if stderr else result.interval)


def _unseen(sizes: Tensor) -> float:
    """The part of the covariance of examples that batches of these sizes leave to chance; 0 for single examples."""
    return max(float(1 - (1 / sizes).mean()), 0.0)


def _interval_of_ratio(value: float, gram: Tensor, sizes: Tensor, sampled: bool) -> tuple[float, float] | None:
    """Student's interval of the logarithm, by a jackknife over batches; None where a logarithm is not finite."""

    def log_ratio(gram: Tensor, sizes: Tensor) -> float:
        trace, squared = _noise(gram, sizes, sampled=True)
        ratio = trace / (squared if sampled else 1.0) if squared else math.nan  # else ||g|| is known
        return math.log(ratio) if ratio > 0 else math.nan

    stderr = jackknife(log_ratio, gram, sizes.tolist())
    if not sampled:  # the whole is what the batches are parts of
        stderr *= math.sqrt(_unseen(sizes))
    factor = math.exp(min(student_half_width(stderr, len(sizes)), 700.0))
    return (value / factor, value * factor) if math.isfinite(stderr + value) else None


def _check_batches(loss: Loss, why: str) -> None:
    if loss.num_batches < 2:
        raise ValueError(f"{why}, and this loss has one: split it into several")


def _regret(
    gram: Tensor, loss: Loss, options: dict[str, Any], solutions: list[Solution], details: dict[str, Any]
) -> Estimate:
    """The regret, from the inner products of the gradients, (B, B) float64."""
    p = batch_weights(loss)
    pairs, norms = pair_weights(p), gram.diagonal().clamp(min=0).sqrt()
    value, mean_cosine = _mean_regret(gram, p), _mean_cosine(gram, p)
    product = float((pairs * norms).sum() / pairs.sum()) * (1 - mean_cosine)
    solved = all(s.converged for s in solutions)
    return estimate(
        loss,
        value,
        jackknife(_mean_regret, gram, loss.batch_weights),
        num_samples=len(p),
        converged=solved,
        reason=None if solved or not math.isfinite(value) else "conjugate gradients stopped with residuals above tol",
        details=_norms(gram, p)
        | {
            "mean_cosine": mean_cosine,
            "product_of_means": product,
            "covariance": value - product,
            "rank": _rank(gram, loss),
        }
        | details,
        settings=settings("gradient_regret", loss, **options),
    )


def _mean_regret(gram: Tensor, weights: Tensor) -> float:
    """sum_ij w_i w_j ||g_j|| (1 - cos(g_i, g_j)) over pairs, normalized."""
    pairs, norms = pair_weights(weights), gram.diagonal().clamp(min=0).sqrt()
    return float((pairs * norms * (1 - cosines(gram))).sum() / pairs.sum())


def _mean_cosine(gram: Tensor, weights: Tensor) -> float:
    pairs = pair_weights(weights)
    return float((pairs * cosines(gram)).sum() / pairs.sum())


def _norms(gram: Tensor, p: Tensor) -> dict[str, Any]:
    """E||g|| <= sqrt(tr E g g^T), the length of the mean, and all of them."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    return {
        "mean_norm": float(p @ norms),
        "root_mean_square_norm": math.sqrt(max(float(p @ gram.diagonal()), 0.0)),
        "gradient_norm": math.sqrt(max(float(p @ gram @ p), 0.0)),
        "norms": norms.tolist(),
    }


def _rank(gram: Tensor, loss: Loss) -> int | None:
    """The numerical rank of the gradients. The Gram matrix holds squares, so the threshold is the square of eps."""
    if not gram.isfinite().all():
        return None
    epsilon = torch.finfo(torch.promote_types(loss.params[0].dtype, torch.float32)).eps
    values = torch.linalg.eigvalsh(gram)
    return int((values > len(gram) * max(epsilon**2, torch.finfo(torch.float64).eps) * values[-1]).sum())


def _effective_dimension(shares: list[tuple[float, bool]]) -> dict[str, Any]:
    """The mean over probes z of z^T M (M + damping)^-1 z, E z z^T = 1; nan where a probe did not settle."""
    if not shares:
        return {}
    values = torch.tensor([share if settled else math.nan for share, settled in shares], dtype=torch.float64)
    stderr = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"effective_dimension": float(values.mean()), "effective_dimension_stderr": stderr}


def _signal_to_noise(rows: list[Tensor], p: Tensor) -> tuple[float, int]:
    """Sum over parameters of (E g)^2 / Var g, unbiased variance over batches, and how many have a variance."""
    weights = p.tolist()
    mean = sum(w * g.double() for w, g in zip(weights, rows, strict=True))
    spread = sum(w * (g.double() - mean).square() for w, g in zip(weights, rows, strict=True))
    variance = spread / (1 - float(p @ p))
    some = variance > 0
    return float((mean[some].square() / variance[some]).sum()), int(some.sum())


def _noise(gram: Tensor, sizes: Tensor, sampled: bool) -> tuple[float, float]:
    """tr Sigma and ||G||^2."""
    n, p = float(sizes.sum()), sizes / sizes.sum()
    squared_mean = float(p @ gram @ p)
    between = float(sizes @ gram.diagonal()) - n * squared_mean
    trace = between / (len(sizes) - 1)
    return (trace, squared_mean - trace / n) if sampled else (trace * (n - 1) / n, squared_mean)


def _ratio(trace: float, squared: float) -> float:
    return trace / squared if squared else math.nan


def _trace_of_square(gram: Tensor, sizes: Tensor) -> float:
    """tr Sigma^2, unbiased where batch gradients are normal: of z_b = sqrt(n_b) (g_b - g), whose Gram matrix has
    E tr C^2 = d (d + 1) tr Sigma^2 + d (tr Sigma)^2 and E (tr C)^2 = d^2 (tr Sigma)^2 + 2 d tr Sigma^2, d = B - 1."""
    d = len(sizes) - 1
    if d < 2:
        return math.nan
    root, p = sizes.sqrt(), sizes / sizes.sum()
    centered = gram - (gram @ p)[:, None] - (p @ gram) + p @ gram @ p
    c = root[:, None] * centered * root
    return max(float(c.square().sum() - c.trace().square() / d) / ((d - 1) * (d + 2)), 0.0)
