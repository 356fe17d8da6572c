"""Curvature against PyHessian: largest eigenvalue, five largest, trace, spectral density.

PyHessian gets all examples in one batch, the form in which it keeps its graph and is fastest. Its power iteration
stops where two values in a row differ by less than 1e-3; ours where the error is bounded by 1e-3.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.speed.rows import Problem, Row
from sam_optim import Loss, hessian_eigenvalues, hessian_trace, spectral_density

TOL = 1e-3
TRACE_PRODUCTS, DENSITY_PROBES, DENSITY_STEPS = 60, 2, 15


def rows(problem: Problem) -> list[Row]:
    """The peer of a row is None without PyHessian."""
    result = importlib.util.find_spec("pyhessian") is not None

    def peer(run: Callable[[Any], dict[str, Any]]) -> Callable[[], dict[str, Any]] | None:
        return (lambda: _with_pyhessian(problem, run)) if result else None

    return [
        Row("lambda_max", lambda: _eigenvalues(problem, 1), peer(lambda h: _power_iteration(h, 1)), 0.75),
        Row("trace", lambda: _trace(problem), peer(_hutchinson), None),
        Row("spectral density", lambda: _density(problem), peer(_quadrature), 0.75),
        Row("top 5", lambda: _eigenvalues(problem, 5), peer(lambda h: _power_iteration(h, 5)), 1 / 3),
    ]


def _loss(problem: Problem) -> Loss:
    return Loss(problem.make_model(), problem.criterion, [_whole(problem)])


def _whole(problem: Problem) -> tuple[Any, Any]:
    return torch.cat([x for x, _ in problem.batches]), torch.cat([y for _, y in problem.batches])


def _eigenvalues(problem: Problem, num: int) -> dict[str, Any]:
    result = hessian_eigenvalues(_loss(problem), num=num, tol=TOL, stop="value")
    return {"values": result.eigenvalues.tolist(), "products": result.num_products, "converged": result.converged}


def _trace(problem: Problem) -> dict[str, Any]:
    result = hessian_trace(_loss(problem), num_probes=TRACE_PRODUCTS)
    return {"value": result.value, "stderr": result.stderr, "products": result.details["num_products"]}


def _density(problem: Problem) -> dict[str, Any]:
    result = spectral_density(_loss(problem), num_probes=DENSITY_PROBES, num_lanczos=DENSITY_STEPS)
    return {
        "stderr": float(result.stderr.max()),
        "largest": float(result.eigenvalues[0]),
        "products": result.num_products,
    }


def _with_pyhessian(problem: Problem, run: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    from pyhessian import hessian

    with warnings.catch_warnings(), _eig(), _counted() as count:
        warnings.simplefilter("ignore")  # PyHessian calls backward() with create_graph, which leaks memory
        model = problem.make_model()
        h = hessian(model, problem.criterion, data=_whole(problem), cuda=next(model.parameters()).is_cuda)
        result = run(h) | {"products": count[0]}
        for p in model.parameters():
            p.grad = None
    return result


def _power_iteration(h: Any, num: int) -> dict[str, Any]:
    values, _ = h.eigenvalues(maxIter=100, tol=TOL, top_n=num)
    return {"values": [float(x) for x in values]}


def _hutchinson(h: Any) -> dict[str, Any]:
    probes = [float(x) for x in h.trace(maxIter=TRACE_PRODUCTS, tol=0.0)]
    return {"value": statistics.fmean(probes), "stderr": statistics.stdev(probes) / len(probes) ** 0.5}


def _quadrature(h: Any) -> dict[str, Any]:
    values, _ = h.density(iter=DENSITY_STEPS, n_v=DENSITY_PROBES)
    return {"largest": max(float(max(v)) for v in values)}


@contextmanager
def _eig() -> Iterator[None]:
    """`torch.eig`, which PyHessian's density calls, and which torch has removed, or left as a name that raises."""
    original = getattr(torch, "eig", None)

    def eig(a: Any, eigenvectors: bool = False) -> tuple[Any, Any]:
        values, vectors = torch.linalg.eigh(a)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    torch.eig = eig
    try:
        yield
    finally:
        if original is None:
            del torch.eig
        else:
            torch.eig = original


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Counts PyHessian's Hessian-vector products."""
    module = importlib.import_module("pyhessian.hessian")  # the package has a class of that name
    original, count = module.hessian_vector_product, [0]

    def product(*args: Any) -> Any:
        count[0] += 1
        return original(*args)

    module.hessian_vector_product = product
    try:
        yield count
    finally:
        module.hessian_vector_product = original
