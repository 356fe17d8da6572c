"""The loss of a model over fixed batches as a function of its weights: value, gradient and curvature products."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_optim.core import module_state
from sam_optim.core import random as rng
from sam_optim.core.contexts import undone
from sam_optim.loss import criterion as criteria
from sam_optim.loss import differences as by_differences
from sam_optim.loss import products
from sam_optim.loss.batches import FixedBatches, checksum, data_id, divided, joined, moved, part, tensors, tree_map
from sam_optim.loss.criterion import Criterion, Forward
from sam_optim.loss.curvature import PROBE, Curvature, SavedBytes, Sum, budgets
from sam_optim.loss.distributed import Sharding
from sam_optim.loss.passes import Passes, is_spread, may_be_in_ddp
from sam_optim.loss.pieces import Pieces
from sam_optim.loss.weights import A_SUM, WHY_NONE, Weigher, weight_of, weights_of

MATRICES = ("hessian", "ggn", "fisher", "empirical_fisher")
SAMPLED = ("fisher_mc",)  # an estimate of one of them, by draws
JOINED = 128  # examples of small batches that pass through the model together, at most
# Gradients and values are compared on so many examples, in pairs; second derivatives are checked on one of each ONE_IN
# examples, for less than the cost of a gradient of ten batches. On one alone, where its outputs are so many bytes:
MOST_CHECKED, ONE_IN = 32, 80
MANY_OUTPUT_BYTES = 2**22
GROWTH, SAME_GROWTH = 0.01, 1e-3  # relative: of a loss that grows with its examples, and between two laws of growth

T = TypeVar("T")


class Loss:
    """L(w) = sum_b W_b l_b(w) / sum_b W_b,   l_b = criterion(model(x_b), y_b), the mean over batch b.

    W_b is what the mean of batch b was taken over: its examples, or with ignored labels and weights of classes the
    labels that count and their weights, so that L is the mean over all batches in one.

    The batches are the same in every pass: what a pass yields is compared with what the first one gave, and a
    difference is an error. The model is measured in eval mode, without dropout, and left exactly as found: weights,
    buffers, modes, `p.grad`, and the global generators, also after an exception. In second-order products attention
    runs on the math backend, the only one with double backward.

    Weights in bfloat16 or float16 are measured in float32, so that small displacements are not rounded away: each call
    works on float32 copies of them and of low-precision tensors in the batches. Hooks on the gradients of parameters
    (masks, clipping) are not part of L: they do not run in a measure, and stay for training. Small batches pass through
    the model together where that gives the same mean.

    Under torch.distributed each rank holds its share of the batches (`batches[rank::world_size]`; a share may be empty)
    and all ranks make the same calls: each gets the numbers of one process that holds all of them.

    Args:
        model: the model at the weights w. Of a DDP or compiled model, the module inside is measured.
        criterion: (outputs, target) -> 0-d mean over the examples of a batch. None takes `outputs.loss`.
        batches: a list of batches, or a DataLoader that yields the same ones in every pass. A batch is a tuple
            (inputs..., target), or a mapping with "labels" that the model takes as keywords.
        forward: (model, batch) -> (outputs, target), for batches and models of other forms.
        normalize_logits: the outputs o, (n, K), become (o - mean o) / ||o - mean o|| of each example.
        batch_statistics: normalization layers use the statistics of the batch instead of the running ones; a different
            function of w, so results say which.
        device: where batches are moved; None is where the parameters are.
        distributed: False measures on each rank alone; None is True where a process group of several ranks runs.
        chunk_size: examples of a batch in one graph of a curvature product, at most. None: as many as save 128 MiB (on
            a device, an eighth of its memory), which is also faster on a CPU. A batch stays whole where the loss is not
            a mean over pieces: batch statistics, losses of pairs, `outputs.loss`.
        batch_weights: W_b of each batch, or a function of a batch. None: derived from the criterion, its labels, and
            its value on a batch joined with a few examples of the first (see `loss.weights.Weigher`).
        differences: compute products by central differences of gradients (of outputs, for J v of the other matrices) in
            float64: for models whose double backward is missing (hard sigmoids, fused kernels) or wrong. None: only
            where it is missing; results say so, with the Hessian's error, estimated from two steps.

    Attributes:
        params: the trainable parameters, in the order of `model.parameters()`; vectors are lists in their shapes.
        blocks: the names that `block` restricted them to; None is all.
        batch_sizes: n_b of each batch (as in `FixedBatches`), of all ranks. num_batches: how many. num_examples: N,
            their sum. batch_weights: W_b of each batch.

    Raises:
        ValueError: no or empty batches, passes that differ, no trainable parameters, a criterion that is not a mean, or
            nan at finite outputs; ranks that hold the same batches or different weights.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None,
        batches: Iterable[Any],
        *,
        forward: Forward | None = None,
        normalize_logits: bool = False,
        batch_statistics: bool = False,
        device: torch.device | str | None = None,
        distributed: bool | None = None,
        chunk_size: int | None = None,
        batch_weights: Sequence[float] | Callable[[Any], float] | None = None,
        differences: bool | None = None,
    ):
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size counts examples and must be >= 1 or None, got {chunk_size}")
        how: dict[str, Any] = {"normalize_logits": normalize_logits, "batch_statistics": batch_statistics}
        self._passes = Passes(model, criterion, forward, **how, device=device)
        self.params = self._passes.params
        self.chunk_size = chunk_size
        self.blocks: tuple[str, ...] | None = None
        is_function = batch_weights is None or callable(batch_weights)
        self._given_weights: Any = batch_weights if is_function else weights_of(batch_weights)
        self._weigher: Weigher | None = None
        self._sample: list[Any] = []  # a few examples of this rank, which are checked
        self._joins = 1  # examples of small batches that are computed together, at most
        self._second: dict[str, Any] = {"by differences": differences}  # shared with all losses made from this one
        self._pushes = False  # J v by differences of outputs
        self._hold(batches, Sharding(distributed))

    def _hold(self, batches: Iterable[Any], sharding: Sharding) -> None:
        self._sharding = sharding
        self._batches = sharding.together(lambda: FixedBatches(batches, may_be_empty=not sharding.is_single))
        sharding.check(self._batches.fingerprints, [w for w in self.params if not is_spread(w)])
        self._fingerprints = sharding.interleave(self._batches.fingerprints)
        self._sizes = tuple(n for n, _ in self._fingerprints)
        if not self._sizes:
            raise ValueError("a loss needs batches with examples in them, and no rank has any")
        self.batch_sizes = self._sizes
        self.num_batches = len(self._sizes)
        self.num_examples = sum(self._sizes)
        self._local_weights: list[float] | None = None

    @property
    def device(self) -> torch.device:
        """The device of the batches: that of the parameters, also after a framework has moved them."""
        return self._passes.device

    @property
    def model(self) -> nn.Module:
        return self._passes.model

    @property
    def criterion(self) -> Criterion | None:
        return self._passes.criterion

    @property
    def normalize_logits(self) -> bool:
        return self._passes.normalize_logits

    @property
    def batch_statistics(self) -> bool:
        return self._passes.batch_statistics

    @property
    def batch_weights(self) -> tuple[float, ...]:
        """W_b of each batch, of all ranks; in units of examples, labels or weights of classes (see `settings`)."""
        self._weigh()
        return self._weights if len(self._weights) == self.num_batches else (math.fsum(self._weights),)

    def zeros(self) -> list[Tensor]:
        """A vector of zeros: one tensor for each parameter, in float32 or better."""
        return [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in self.params]

    def value(self) -> Tensor:
        """L(w), 0-d float64 on the CPU."""

        def local() -> float:
            with self._passes.evaluating(grad=False):
                pairs = [(weight, self._passes.loss(batch)) for weight, _, batch in self._joined_batches()]
            return math.fsum(p * x for (p, _), x in zip(pairs, _floats([x for _, x in pairs]), strict=True))

        values = self._sharding.all_gather(self._sharding.together(local))
        return torch.tensor(math.fsum(values), dtype=torch.float64)

    def batch_values(self) -> Tensor:
        """l_b(w) of each batch, (num_batches,) float64 on the CPU."""
        if self.num_batches != len(self._sizes):
            return self.value()[None]

        def local() -> list[float]:
            with self._passes.evaluating(grad=False):
                return _floats([self._passes.loss(batch) for _, _, batch in self._weighted_batches()])

        return torch.tensor(self._sharding.interleave(self._sharding.together(local)), dtype=torch.float64)

    def value_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """L(w), 0-d float64, and dL/dw in the shapes of `params`; 0 for a parameter that L does not depend on."""
        self._check_whole()
        weights: list[float] = []
        values: list[Tensor] = []

        def local() -> list[Tensor]:
            with self._passes.evaluating(grad=True):
                total = Sum(self.params)
                for weight, _, batch in self._joined_batches():
                    loss = self._passes.loss(batch)
                    total.add(torch.autograd.grad(loss, self.params, materialize_grads=True), weight)
                    weights.append(weight)
                    values.append(loss.detach())
            return total.tensors

        gradient = self._sharding.all_reduce(local)
        value = math.fsum(p * x for p, x in zip(weights, _floats(values), strict=True))
        return torch.tensor(math.fsum(self._sharding.all_gather(value)), dtype=torch.float64), gradient

    def gradient(self) -> list[Tensor]:
        """dL/dw in the shapes of `params`."""
        return self.value_and_gradient()[1]

    def hessian_product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """H v, H = d^2 L / dw^2; v and the result in the shapes of `params`."""
        return self._product("hessian", v)

    def ggn_product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """G v, G = sum_b n_b / N J_b^T (d^2 criterion / d outputs^2) J_b, the generalized Gauss-Newton matrix."""
        return self._product("ggn", v)

    def fisher_product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """F v, F = E_x E_{y ~ softmax(outputs)} g g^T, computed exactly: for cross-entropy it is the GGN."""
        return self._product("fisher", v)

    def empirical_fisher_product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """E v, E = 1/N sum_i g_i g_i^T with the gradients of single examples and the labels of the data."""
        return self._product("empirical_fisher", v)

    def fisher_mc_product(self, v: Sequence[Tensor], *, seed: int = 0) -> list[Tensor]:
        """F v with one label y ~ softmax(outputs) for each example instead of the expectation over y."""
        return self._product("fisher_mc", v, seed=seed)

    @contextmanager
    def curvature(self, matrix: str = "hessian", *, seed: int = 0, draws: int = 1) -> Iterator[products.Product]:
        """v -> M v at fixed weights, for many products in a row: graphs are kept between them as far as 896 MiB (on a
        device, an eighth of its memory) go, which saves 40 % of the time; the rest is streamed, one at a time.
        "fisher_mc" has `draws` labels for each example, which depend on `seed` and the contents of a batch alone."""
        if matrix not in MATRICES + SAMPLED:
            raise ValueError(f"matrix must be one of {', '.join(MATRICES + SAMPLED)}, got {matrix!r}")
        if matrix in ("empirical_fisher", "fisher_mc") and self.batch_statistics:
            raise ValueError("with batch_statistics=True an example has no gradient of its own; use matrix='ggn'")
        self._check_whole()
        self._weigh()
        if self._uses_differences():
            with self._by_differences(matrix, seed, draws) as product:
                yield product
            return
        weigher = self._weigher or Weigher(self.criterion, None, None)  # of a rank without batches
        pieces = Pieces(matrix, self._passes, self.params, weigher, self.displaced if self._pushes else None)
        with self._passes.evaluating(grad=True), sdpa_kernel(SDPBackend.MATH), self._passes.eager():
            yield Curvature(
                self.params,
                (lambda: self._with_draws(seed, draws)) if matrix == "fisher_mc" else self._joined_batches,
                pieces.product,
                pieces.shares,
                self._sharding,
                chunk_size=self.num_examples if self.batch_statistics else self.chunk_size,
                output_bytes=weigher.output_bytes,
            )

    @property
    def rank(self) -> int:
        """The rank of this process, 0 without torch.distributed."""
        return self._sharding.rank

    def over_ranks(self, value: T) -> list[T]:
        """The value on each rank that holds a share of the batches."""
        return self._sharding.all_gather(value)

    def block(self, *names: str) -> Loss:
        """The same loss as a function of some parameters alone, the others fixed: those whose name in the model is one
        of `names`, or begins with one and a dot ("layer1": all of that layer). Curvature becomes that block of it."""
        if not names:
            raise ValueError("a block needs the name of a parameter or module")
        inside: dict[str, Tensor] = {}
        named = dict(zip(self.parameter_names(), self.params, strict=True))
        for prefix in names:
            members = {name: p for name, p in named.items() if name == prefix or name.startswith(f"{prefix}.")}
            if not members:
                raise ValueError(f"no parameter of this loss is {prefix!r} or in it; there are {', '.join(named)}")
            inside |= members
        return self._copy(params=[p for name, p in named.items() if name in inside], blocks=names)

    def with_criterion(self, criterion: Criterion) -> Loss:
        """Another loss of the same outputs, over the same batches."""
        return self._copy(_passes=self._passes.with_criterion(criterion), _weigher=None, _local_weights=None)

    def merged(self) -> Loss:
        """L as one unit: a single batch of all examples, which still passes through memory batch by batch."""
        return self._copy(batch_sizes=(self.num_examples,), num_batches=1)

    def parameter_names(self) -> list[str]:
        """Names in the model, in the order of `params`."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [names[id(p)] for p in self.params]

    def over_batches(self, f: Callable[[Loss], T]) -> list[T]:
        """f of the Loss over each batch alone, the unit of m-sharpness, in the order of `batch_sizes`.

        Each rank calls f for the batches of its own, and all get all results: numbers, tensors, or tuples, lists and
        mappings of them. An error on one rank is one on all.
        """
        if self.num_batches != len(self._sizes):
            return [f(self)]
        return self._sharding.interleave_together(lambda: [f(single) for single in self.single_batches()], self.device)

    def single_batches(self) -> Iterator[Loss]:
        """A Loss over each batch alone, of this rank; see `over_batches`."""
        for _, _, batch in self._weighted_batches():
            yield self._over([batch], Sharding(distributed=False))

    def split(self, size: int) -> Loss:
        """The same function of the weights over batches of at most `size` examples: another m of m-sharpness.

        Raises:
            ValueError: size < 1, or a batch whose tensors do not all begin with its examples.
        """
        if size < 1:
            raise ValueError(f"size counts examples and must be >= 1, got {size}")
        pieces: list[Any] = []
        for _, n, batch in self._weighted_batches():
            parts = divided(batch, n, size)
            if len(parts) < -(-n // size):
                raise ValueError("this batch cannot be split: not all of its tensors begin with its examples")
            if self._weigher is None or self._weigher.rule == "examples":
                pieces += [piece for _, piece in parts]
            else:  # a piece whose labels are all ignored has no mean
                pieces += [piece for k, piece in parts if self._weigher(self._passes.target(piece), k)]
        return self._over(pieces, self._sharding)

    def _copy(self, **changes: Any) -> Loss:
        derived = copy.copy(self)
        derived.__dict__.update(changes)
        return derived

    def _over(self, batches: list[Any], sharding: Sharding) -> Loss:
        derived = self._copy()
        derived._hold(batches, sharding)
        return derived

    @contextmanager
    def displaced(self, d: Sequence[Tensor]) -> Iterator[None]:
        """The weights at w + d, d in the shapes of `params`. They come back bit for bit in the same storage, never by
        subtraction, whatever happens inside."""
        if (got := [tuple(x.shape) for x in d]) != [tuple(w.shape) for w in self.params]:
            raise ValueError(f"d needs one tensor for each parameter, of its shape (see `params`), got shapes {got}")
        grad = torch.is_grad_enabled()
        with self._passes.widened():
            saved = [w.detach().clone() for w in self.params]

            def restore() -> None:
                torch.set_grad_enabled(False)
                for w, s in zip(self.params, saved, strict=True):
                    w.copy_(s)
                torch.clear_autocast_cache()
                torch.set_grad_enabled(grad)

            with undone(restore):
                with torch.no_grad():
                    for w, x in zip(self.params, d, strict=True):
                        w.add_(x)
                torch.clear_autocast_cache()  # or an enclosing autocast region would keep using the weights at w
                yield

    def settings(self) -> dict[str, Any]:
        """What a result has to say about its loss: m and n in examples, and which function of w it is."""
        return {
            "m": max(self.batch_sizes),
            "n": self.num_examples,
            "num_batches": self.num_batches,
            "num_parameters": sum(w.numel() for w in self.params),
            "batch_norm": module_state.statistics_in_use(self.model, batch_statistics=self.batch_statistics),
            "normalize_logits": self.normalize_logits,
            "parameters": None if self.blocks is None else list(self.blocks),
            "dtype": str(self.params[0].dtype).removeprefix("torch.") + (", in float32" if self._passes.wide else ""),
            "device": self.device.type,
            "data": data_id(self._fingerprints),
            "weights": self._rule(),
        } | self._second_order()

    def _second_order(self) -> dict[str, Any]:
        if not self._second["by differences"]:
            return {}
        return {"products": "central differences", "product_error": self._second.get("error")}

    def _weighted_batches(self, size: int = 1) -> Iterator[tuple[float, int, Any]]:
        """(W_b / sum W, n_b, batch on the device) for each batch of this rank; small ones joined to `size` examples."""
        self._weigh()
        total = math.fsum(self._weights)
        assert self._local_weights is not None
        shares = [weight / total for weight in self._local_weights]
        for share, n, batch in joined(zip(shares, self._batches.sizes, self._batches, strict=True), size):
            yield share, n, moved(batch, self.device)

    def _joined_batches(self) -> Iterator[tuple[float, int, Any]]:
        """The same with small batches joined, where that is the same mean."""
        self._weigh()
        return self._weighted_batches(self._joins)

    def _weigh(self) -> None:
        """What the batches weigh; once, with the checks that one batch can answer."""
        if self._local_weights is None:
            weights = self._sharding.together(self._weights_of_batches)
            self._weights = tuple(self._sharding.interleave(weights))
            for i, weight in enumerate(self._weights):
                if not 0 < weight < math.inf:
                    rule = "examples" if self._weigher is None else self._weigher.rule
                    raise ValueError(f"batch {i} has the weight {weight:.8g}, {WHY_NONE[rule]}")
            self._local_weights = weights

    def _weights_of_batches(self) -> list[float]:
        """The weights of this rank's batches."""
        sizes, given = self._batches.sizes, self._given_weights
        if self._weigher is None and sizes:
            self._look_at(*self._first(PROBE))
        weigher = self._weigher
        needs_none = len(self._sizes) == 1 and not (given is None and weigher and weigher.reads_labels)
        if weigher is None or needs_none or (given is None and not weigher.may_differ):
            weights: list[float] = list(sizes)
        elif isinstance(given, list):
            if len(given) != len(sizes):
                raise ValueError(f"batch_weights needs one number for each batch, got {len(given)} for {len(sizes)}")
            weights = given
        elif given is not None:
            weights = [weight_of(given(batch), i) for i, batch in enumerate(self._batches)]
        else:
            with self._passes.evaluating(grad=False):
                batches = zip(sizes, self._batches, strict=True)
                weights = [weigher(self._passes.target(moved(batch, self.device)), n) for n, batch in batches]
        return weights

    def _first(self, size: int) -> tuple[int, Any]:
        """The first batch, or if it is smaller the first ones joined, if they can be, to at most `size` examples."""
        few = islice(zip(self._batches.sizes, self._batches.read(), strict=False), size)
        _, n, batch = next(joined(((0.0, n, batch) for n, batch in few), size))
        return n, moved(batch, self.device)

    def _look_at(self, n: int, batch: Any) -> None:
        """What one batch shows: what its mean is taken over, and whether gradients are those of the same function."""
        with self._passes.evaluating(grad=False):
            outputs, target = self._passes.outputs(batch)
            without = float(self._passes.of_outputs(outputs, target))
            weigher = Weigher(self.criterion, outputs, target)
            is_nan = math.isnan(without) and not weigher.reads_labels
            if is_nan and (seen := tensors(outputs)) and all([x.isfinite().all() for x in seen]):
                raise ValueError(
                    "the loss of the first batch is nan where the model's outputs are finite: look at its targets "
                    "(nan, or labels that are all ignored) and at the criterion (a logarithm or root of a negative "
                    "number)"
                )
        del outputs  # of a large vocabulary more than all the rest
        if not weigher.is_sure and self._grows(n, batch):
            raise ValueError(A_SUM)
        self._weigher, self._joins, self._sample = weigher, 1, []
        if not any(map(is_spread, self.params)):
            is_large = weigher.output_bytes > MANY_OUTPUT_BYTES and not self.batch_statistics
            self._sample = self._checked_examples(n, batch, *((1, 1) if is_large else (2, MOST_CHECKED)))
            room = budgets(self.device)[0] * n // max(self._check_one_function(batch, without), 1)
            size = min(JOINED, self.chunk_size or JOINED, room)
            may_join = self._given_weights is None and not self.batch_statistics and weigher.is_sure
            if may_join and self._is_mean_of_joined(weigher, min(size, 2 * PROBE)):
                self._joins = size

    def _grows(self, n: int, batch: Any) -> bool:
        """Whether the loss of some examples taken k times grows with k as that of no mean does: with k itself, also
        beside a part that does not grow, or with a power of k. (A loss of pairs may change in another way.)"""
        k, piece = self._with_a_loss(divided(batch, n, -(-n // 2)))
        values = []
        for times in (1, 2, 3):
            *_, (_, _, together) = joined([(0.0, k, piece)] * times, times * k)
            with self._passes.evaluating(grad=False):
                values.append(float(self._passes.loss(together)))
        once, twice, thrice = values
        growth = twice - once
        if not (all(map(math.isfinite, values)) and abs(growth) > GROWTH * abs(twice)):
            return False
        if math.isclose(growth, thrice - twice, rel_tol=SAME_GROWTH):
            return True
        if min(values) <= 0:
            return False
        return math.isclose(math.log(twice / once, 2), math.log(thrice / once, 3), rel_tol=SAME_GROWTH)

    def _checked_examples(self, n: int, batch: Any, size: int, most: int) -> list[Any]:
        """A few examples of all batches, on which second derivatives are to be checked; of at most `most` of them, in
        pieces of `size`, it is checked at once that the model computes one function."""
        drawn = list(self._drawn(size, most))
        for _, _, piece in joined(((0.0, k, piece) for k, piece in drawn), most):
            with self._passes.evaluating(grad=False):
                without = float(self._passes.loss(piece))
            self._check_one_function(piece, without)
        number = max(sum(self._batches.sizes) // (ONE_IN * size), 1)
        every = max(-(-len(drawn) // number), 1)
        few = [piece for _, _, piece in joined(((0.0, k, piece) for k, piece in drawn[every // 2 :: every]), most)]
        with self._passes.evaluating(grad=False):  # where all labels are ignored, all derivatives are 0
            few = [piece for piece in few if 0 < abs(float(self._passes.loss(piece))) < math.inf]
        return few or [self._with_a_loss(divided(batch, n, size))[1]]

    def _drawn(self, size: int, most: int) -> Iterator[tuple[int, Any]]:
        """(examples, piece) of at most `size` of them, one from each of equal parts of all examples of this rank; none
        of batches that cannot be cut."""
        sizes, start = self._batches.sizes, 0
        number = min(max(sum(sizes) // size, 1), most // size)
        where = torch.arange(number) + rng.Stream(0).uniform_like(torch.empty(number, dtype=torch.float64))
        rows = (where * (sum(sizes) / number)).long().tolist()
        for n, batch in zip(sizes, self._batches.read(), strict=False):
            chosen = {min((row - start) // size, max(n // size, 1) - 1) for row in rows if start <= row < start + n}
            if chosen and (n <= size or len(divided(batch, n, -(-n // 2))) > 1):
                for i in sorted(chosen):
                    piece = part(batch, i * size, (i + 1) * size) if n > size else batch
                    yield min(n, size), tree_map(_copied, moved(piece, self.device))
            start += n

    def _check_one_function(self, batch: Any, without: float) -> int:
        """Raises ValueError where the loss is another one with gradients; the bytes that its graph saves."""
        saved = SavedBytes(self.params)
        with self._passes.evaluating(grad=True), saved.counting():
            loss = self._passes.loss(batch, needs_gradient=False)
        if not criteria.equal_to_rounding(without, float(loss.detach()), self._passes.dtype):
            raise ValueError(
                f"the loss is {without:.8g} without gradients and {float(loss.detach()):.8g} with them: the model "
                "computes two functions, and a measure is of one. Look for torch.is_grad_enabled() or a fused path "
                "that only inference takes, and switch it off"
            )
        return saved.count

    def _check_whole(self) -> None:
        if any(map(is_spread, self.params)):
            raise ValueError(
                "the weights are spread over ranks (FSDP2, tensor parallel), and this measure needs their gradients: "
                "only the loss itself can be measured, as by critical_sharpness along a direction"
            )

    def _is_mean_of_joined(self, weigher: Weigher, size: int) -> bool:
        """Whether the first few batches, if they are small, have the same mean when they are computed together."""
        n, together = self._first(size)
        batches: list[Any] = []
        sizes: list[int] = []
        for batch in self._batches.read():
            if sum(sizes) == n:
                break
            batches.append(moved(batch, self.device))
            sizes.append(self._batches.sizes[len(sizes)])
        if len(sizes) < 2:
            return False
        with self._passes.evaluating(grad=False):
            weights = [weigher(self._passes.target(batch), k) for batch, k in zip(batches, sizes, strict=True)]
            alone = math.fsum(w * float(self._passes.loss(b)) for w, b in zip(weights, batches, strict=True))
            value = float(self._passes.loss(together))
        return criteria.equal_to_rounding(alone / math.fsum(weights), value, self._passes.dtype)

    def _rule(self) -> str:
        """What the weights of batches are."""
        if self._given_weights is not None:
            return "given"
        self._weigh()
        return "examples" if self._weigher is None else self._weigher.rule

    def _with_draws(self, seed: int, draws: int) -> Iterator[tuple[float, int, Any]]:
        """The same with (batch, (n_b, draws) uniform draws), which depend on the seed and its contents alone."""
        for weight, n, batch in self._weighted_batches():
            # hashed together: torch's generator reads the lower 32 bits of a seed alone
            stream = rng.Stream(zlib.crc32(f"{seed} {checksum(batch)}".encode()))
            yield weight, n, (batch, stream.uniform_like(torch.empty(n, draws, dtype=torch.float64)))

    def _uses_differences(self) -> bool:
        """As chosen; or, once, as a few examples show: whether double backward is there, and right."""
        if self._second["by differences"] is None:
            self._second["by differences"] = self._sharding.any(self._sharding.together(self._lacks_double_backward))
        return bool(self._second["by differences"])

    def _lacks_double_backward(self) -> bool:
        if not self._batches.sizes:
            return False
        probe = self._copy(_given_weights=[1.0] * len(self._sample))
        probe._hold(self._sample, Sharding(distributed=False))
        wide = probe._in_float64()
        try:
            with (wide or probe._copy(_second={"by differences": False})).curvature() as product:
                if wide is None:
                    product([torch.ones_like(w) for w in probe.params])
                    return False
                wrong = by_differences.check(product, wide._differences(), wide.params)
        except RuntimeError as error:
            if by_differences.is_missing(error):
                return True
            raise
        if wrong is not None:
            raise ValueError(
                f"the second derivatives that torch computes for this model are wrong: {wrong}. Look for a custom "
                "autograd function whose backward torch cannot differentiate (once_differentiable, .detach()): "
                "differences=True takes central differences of gradients instead. Or unmasked data have the "
                "padding_idx of an nn.Embedding, whose gradient torch leaves out"
            )
        return False

    def _with_a_loss(self, pieces: Sequence[tuple[int, Any]]) -> tuple[int, Any]:
        """The first piece that shows derivatives: where all labels are ignored they are 0."""
        chosen = pieces[0]
        with self._passes.evaluating(grad=False):
            for k, piece in pieces:
                value = abs(float(self._passes.loss(piece)))
                if 0 < value < math.inf:
                    return k, piece
                if value == 0:
                    chosen = k, piece
        return chosen

    def _in_float64(self) -> Loss | None:
        """The same loss with the weights widened to float64, where w + d is not rounded to the dtype of the model; None
        for a device, a model or a criterion that cannot compute in it, and where DDP may hold the weights."""
        if may_be_in_ddp():
            return None
        wide = self._copy(_passes=self._passes.in_float64(), _second={"by differences": False})
        try:
            wide.value()
        except Exception:
            return None
        return wide

    def _differences(self) -> by_differences.Differences:
        def gradient_at(d: Sequence[Tensor]) -> list[Tensor]:
            with self.displaced(d):
                return self.gradient()

        return by_differences.Differences(self.params, gradient_at)

    @contextmanager
    def _by_differences(self, matrix: str, seed: int, draws: int) -> Iterator[products.Product]:
        """v -> M v where the graphs of the model have no derivative: of gradients, or J v of outputs."""
        wide = self._in_float64() or self._copy(_second={"by differences": False})
        wide._pushes = True
        dtypes = [x.dtype for x in self.zeros()]
        of_matrix = (
            nullcontext(wide._differences()) if matrix == "hessian" else wide.curvature(matrix, seed=seed, draws=draws)
        )
        with wide._passes.widened(), of_matrix as compute:

            def product(v: Sequence[Tensor]) -> list[Tensor]:
                result = compute([x.to(w.dtype) for x, w in zip(v, wide.params, strict=True)])
                self._second["error"] = getattr(compute, "error", None)
                return [x.to(dtype) for x, dtype in zip(result, dtypes, strict=True)]

            yield product

    def _product(self, matrix: str, v: Sequence[Tensor], *, seed: int = 0) -> list[Tensor]:
        with self.curvature(matrix, seed=seed) as product:
            return product(v)


def _copied(x: Any) -> Any:
    """Not a view, which would hold all of its batch."""
    return x.clone() if isinstance(x, Tensor) else x


def _floats(values: list[Tensor]) -> list[float]:
    return torch.stack([v.detach() for v in values]).tolist() if values else []  # one transfer
