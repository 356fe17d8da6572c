"""The loss of a model over fixed batches as a function of its weights: value, gradient and curvature products."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
from sam_optim.loss.batches import (
    FixedBatches,
    channels_last,
    checksum,
    data_id,
    divided,
    joined,
    moved,
    part,
    target_of,
    tree_map,
)
from sam_optim.loss.criterion import Criterion, Forward
from sam_optim.loss.curvature import PROBE, Curvature, SavedBytes, Sum, budgets
from sam_optim.loss.distributed import Sharding
from sam_optim.loss.weights import A_SUM, Weigher, rows_of

MATRICES = ("hessian", "ggn", "fisher", "empirical_fisher")
SAMPLED = ("fisher_mc",)  # an estimate of one of them, by draws

HALF = (torch.bfloat16, torch.float16)
JOINED = 128  # examples of small batches that pass through the model together, at most
CHECKED = 2  # examples for which second derivatives are checked

T = TypeVar("T")


class Loss:
    """L(w) = sum_b W_b l_b(w) / sum_b W_b,   l_b = criterion(model(x_b), y_b), the mean over batch b.

    W_b is what the mean of batch b was taken over: its examples, or with ignored labels and weights of classes the
    labels that count and their weights, so that L is the mean over all batches in one.

    The batches are the same in every pass: what a pass yields is compared with what the first one gave, and a
    difference is an error. The model is measured in eval mode, without dropout, and left exactly as found: weights,
    buffers, modes, `p.grad`, and the global generators, also after an exception. Attention runs on the mathematical
    backend in second-order products, the only one with double backward.

    Weights in bfloat16 or float16 are measured in float32, in which a small step is not rounded away: inside each call
    they are copies, and so are halves in the batches. Batches of few examples pass through the model together where
    that is the same.

    Under torch.distributed each rank holds its share of the batches (`batches[rank::world_size]`; a share may be empty)
    and all ranks make the same calls: each gets the numbers of one process that holds all of them.

    Args:
        model: the model at the weights w. Of a DDP or compiled model, the module inside is measured.
        criterion: (outputs, target) -> 0-d mean over the examples of a batch. None takes `outputs.loss`.
        batches: a list of batches, or a DataLoader that yields the same ones in every pass. A batch is a tuple
            (inputs..., target), or a mapping with "labels" that the model takes as keywords.
        forward: (model, batch) -> (outputs, target), for batches and models of other forms.
        normalize_logits: the outputs o, (n, K), become (o - mean o) / ||o - mean o|| of each example.
        batch_statistics: normalisation layers use the statistics of the batch instead of the running ones; a different
            function of w, so results say which.
        device: where batches are moved; None is where the parameters are.
        distributed: False measures on each rank alone; None is True where a process group of several ranks runs.
        chunk_size: curvature products take at most so many examples of a batch through one graph. None: as many as
            save 128 MiB (on a device, an eighth of its memory), which is also faster on a CPU. A batch stays whole
            where the loss is not a mean over pieces: batch statistics, losses of pairs, `outputs.loss`.
        batch_weights: W_b of each batch, or a function of a batch. None: seen from the criterion, its labels, and what
            it gives to a batch that is joined with a few examples of the first (see `loss.weights.Weigher`).
        differences: products by central differences of gradients (of outputs, for J v of the other matrices), in
            float64: for models without double backward (hard sigmoids, fused kernels), or where it
            is wrong. None: where it is missing; results say so, with the Hessian's error, estimated from two steps.

    Attributes:
        params: the trainable parameters, in the order of `model.parameters()`; vectors are lists in their shapes.
        blocks: the names that `block` restricted them to; None is all.
        batch_sizes: n_b of each batch (as in `FixedBatches`), of all ranks. num_batches: how many. num_examples: N,
            their sum. batch_weights: W_b of each batch.

    Raises:
        ValueError: no or empty batches, passes that differ, no trainable parameters, a criterion that is not a mean;
            ranks that hold the same batches or different weights.
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
        criteria.check(criterion, normalize_logits)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size counts examples and must be >= 1 or None, got {chunk_size}")
        self.model = _unwrapped(model)
        self.criterion = criterion
        self.normalize_logits = normalize_logits
        self.batch_statistics = batch_statistics
        self.chunk_size = chunk_size
        self.blocks: tuple[str, ...] | None = None
        self.params: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("the model has no trainable parameters (requires_grad=True): nothing to measure")
        self._device = None if device is None else torch.device(device)
        self._forward = forward or criteria.default_forward
        if any(p.is_complex() for p in self.params):
            raise ValueError("measures are of real weights: hold complex ones as torch.view_as_real(w)")
        # what narrower weights, buffers and batches are widened to inside a pass
        halves = any(p.dtype in HALF and not _is_spread(p) for p in self.params)
        self._wide = torch.float32 if halves else None
        self._images_last = _convolves_on_cpu(self.model)
        self._given_weights = batch_weights
        self._weigher: Weigher | None = None
        self._joins = 1  # examples of small batches that are computed together, at most
        self._second: dict[str, Any] = {"by differences": differences}  # shared with all losses made from this one
        self._pushes = False  # J v by differences of outputs
        self._hold(batches, Sharding(distributed))

    def _hold(self, batches: Iterable[Any], sharding: Sharding) -> None:
        self._sharding = sharding
        self._batches = sharding.together(lambda: FixedBatches(batches, may_be_empty=not sharding.is_single))
        sharding.check(self._batches.fingerprints, [w for w in self.params if not _is_spread(w)])
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
        """Where the batches go: with the parameters, also after a framework has moved them."""
        return self.params[0].device if self._device is None else self._device

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
            with self._evaluating(grad=False):
                pairs = [(weight, self._batch_loss(batch)) for weight, _, batch in self._joined_batches()]
            return math.fsum(p * x for (p, _), x in zip(pairs, _floats([x for _, x in pairs]), strict=True))

        values = self._sharding.all_gather(self._sharding.together(local))
        return torch.tensor(math.fsum(values), dtype=torch.float64)

    def batch_values(self) -> Tensor:
        """l_b(w) of each batch, (num_batches,) float64 on the CPU."""
        if self.num_batches != len(self._sizes):
            return self.value()[None]

        def local() -> list[float]:
            with self._evaluating(grad=False):
                return _floats([self._batch_loss(batch) for _, _, batch in self._weighted_batches()])

        return torch.tensor(self._sharding.interleave(self._sharding.together(local)), dtype=torch.float64)

    def value_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """L(w), 0-d float64, and dL/dw in the shapes of `params`; 0 for a parameter that L does not depend on."""
        self._check_whole()
        weights: list[float] = []
        values: list[Tensor] = []

        def local() -> list[Tensor]:
            with self._evaluating(grad=True):
                total = Sum(self.params)
                for weight, _, batch in self._joined_batches():
                    loss = self._batch_loss(batch)
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
    def curvature(self, matrix: str = "hessian", *, seed: int = 0) -> Iterator[products.Product]:
        """v -> M v at fixed weights, for many products in a row: graphs are kept between them as far as 896 MiB (on a
        device, an eighth of its memory) go, which saves 40 % of the time; the rest is streamed, one at a time.
        `seed` is of the labels of "fisher_mc", which depend on it and on the contents of their batch alone."""
        if matrix not in MATRICES + SAMPLED:
            raise ValueError(f"matrix must be one of {', '.join(MATRICES + SAMPLED)}, got {matrix!r}")
        if matrix in ("empirical_fisher", "fisher_mc") and self.batch_statistics:
            raise ValueError("with batch_statistics=True an example has no gradient of its own; use matrix='ggn'")
        self._check_whole()
        self._weigh()
        if self._uses_differences():
            with self._by_differences(matrix, seed) as product:
                yield product
            return
        with self._evaluating(grad=True), sdpa_kernel(SDPBackend.MATH), _eager(self.model):
            yield Curvature(
                self.params,
                (lambda: self._with_draws(seed)) if matrix == "fisher_mc" else self._joined_batches,
                lambda piece, keep: self._piece_product(matrix, piece, keep),
                lambda batch, n, size: self._shares_of_pieces(matrix, batch, n, size),
                self._sharding,
                chunk_size=self.num_examples if self.batch_statistics else self.chunk_size,
            )

    @property
    def rank(self) -> int:
        """Of this process, 0 without torch.distributed."""
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
        criteria.check(criterion, self.normalize_logits)
        return self._copy(criterion=criterion, _weigher=None, _local_weights=None)

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
                pieces += [piece for k, piece in parts if self._weigher(self._target(piece), k)]
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
        with self._widened():
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
                torch.clear_autocast_cache()  # or an enclosing autocast region would go on using the weights at w
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
            "dtype": str(self.params[0].dtype).removeprefix("torch.") + (", in float32" if self._wide else ""),
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
                if not (math.isfinite(weight) and weight > 0):
                    raise ValueError(f"batch {i} has the weight {weight}, as if no label counts: leave it out")
            self._local_weights = weights

    def _weights_of_batches(self) -> list[float]:
        """Of this rank."""
        sizes, given = self._batches.sizes, self._given_weights
        if self._weigher is None and sizes:
            self._look_at(*self._first(PROBE))
        if (
            self._weigher is None
            or len(self._sizes) == 1
            or (given is None and self._weigher.rule == "examples" and not self._weigher.is_blind)
        ):
            weights: list[float] = list(sizes)
        elif isinstance(given, Sequence):
            if len(given) != len(sizes):
                raise ValueError(f"batch_weights needs one number for each batch, got {len(given)} for {len(sizes)}")
            weights = [float(w) for w in given]
        elif given is not None:
            weights = [float(given(batch)) for batch in self._batches]
        else:
            with self._evaluating(grad=False):
                batches = zip(sizes, self._batches, strict=True)
                weights = [self._weigher(self._target(moved(batch, self.device)), n) for n, batch in batches]
        return weights

    def _first(self, size: int) -> tuple[int, Any]:
        """The first batch, or if it is smaller the first ones joined, if they can be, to at most `size` examples."""
        few = islice(zip(self._batches.sizes, self._batches.read(), strict=False), size)
        _, n, batch = next(joined(((0.0, n, batch) for n, batch in few), size))
        return n, moved(batch, self.device)

    def _look_at(self, n: int, batch: Any) -> None:
        """What one batch shows: what its mean is taken over, and whether gradients are those of the same function."""
        with self._evaluating(grad=False):
            outputs, target = self._outputs(batch)
            without = float(criteria.value(self.criterion, outputs, target))
            weigher = Weigher(self.criterion, outputs, target)
            halves = [] if weigher.is_sure else divided(batch, n, -(-n // 2))
            if len(halves) == 2:
                parts = [float(criteria.value(self.criterion, *self._outputs(half))) for _, half in halves]
                if all(parts) and abs(math.fsum(parts) - without) < 1e-3 * max(map(abs, parts)):
                    raise ValueError(A_SUM)
        self._weigher, self._joins = weigher, 1
        if not any(map(_is_spread, self.params)):
            room = budgets(self.device)[0] * n // max(self._check_one_function(batch, without), 1)
            size = min(JOINED, self.chunk_size or JOINED, room)
            may_join = self._given_weights is None and not self.batch_statistics and weigher.is_sure
            if may_join and self._is_mean_of_joined(weigher, min(size, 2 * PROBE)):
                self._joins = size

    def _check_one_function(self, batch: Any, without: float) -> int:
        """Raises ValueError where the loss is another one with gradients; the bytes that its graph saves."""
        saved = SavedBytes(self.params)
        with self._evaluating(grad=True), saved.counting():
            loss = criteria.value(self.criterion, *self._outputs(batch), needs_gradient=False)
        if not criteria.equal_to_rounding(without, float(loss.detach()), self._wide or self.params[0].dtype):
            raise ValueError(
                f"the loss is {without:.8g} without gradients and {float(loss.detach()):.8g} with them: the model "
                "computes two functions, and a measure is of one. Look for torch.is_grad_enabled() or a fused path "
                "that only inference takes, and switch it off"
            )
        return saved.count

    def _check_whole(self) -> None:
        if any(map(_is_spread, self.params)):
            raise ValueError(
                "the weights are spread over ranks (FSDP2, tensor parallel), and this measure needs their gradients: "
                "there are only values of the loss, as in critical_sharpness along a direction"
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
        with self._evaluating(grad=False):
            weights = [weigher(self._target(batch), k) for batch, k in zip(batches, sizes, strict=True)]
            alone = math.fsum(w * float(self._batch_loss(b)) for w, b in zip(weights, batches, strict=True))
            value = float(self._batch_loss(together))
        return criteria.equal_to_rounding(alone / math.fsum(weights), value, self._wide or self.params[0].dtype)

    def _target(self, batch: Any) -> Any:
        return target_of(batch) if self._forward is criteria.default_forward else self._outputs(batch)[1]

    def _rule(self) -> str:
        """What the weights of batches are."""
        if self._given_weights is not None:
            return "given"
        self._weigh()
        return "examples" if self._weigher is None else self._weigher.rule

    def _with_draws(self, seed: int) -> Iterator[tuple[float, int, Any]]:
        """The same with (batch, (n_b,) uniform draws): those of a batch depend on the seed and its contents alone."""
        for weight, n, batch in self._weighted_batches():
            # hashed together: torch's generator reads the lower 32 bits of a seed alone
            stream = rng.Stream(zlib.crc32(f"{seed} {checksum(batch)}".encode()))
            yield weight, n, (batch, stream.uniform_like(torch.empty(n, dtype=torch.float64)))

    @contextmanager
    def _evaluating(self, *, grad: bool) -> Iterator[None]:
        cuda = [self.device] if self.device.type == "cuda" else []
        measured = module_state.measured(self.model, batch_statistics=self.batch_statistics)
        # a model that draws in eval mode draws the same in every pass
        preserved, aside = rng.preserved(cuda), rng.Aside(0, cuda)
        before, fast_path = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()
        try:
            torch.clear_autocast_cache()  # torch 2.8 gives the casts of a pass without gradients to one that needs them
            torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder's, of another function for padding
            with self._widened(), preserved, measured, aside, torch.inference_mode(False), torch.set_grad_enabled(grad):
                yield
        finally:
            for module in self.model.modules():
                if hasattr(module, "_get_fsdp_state"):  # FSDP2 would use the gathered weights again, also after a move
                    module.reshard()  # type: ignore[operator]
            torch.backends.mha.set_fastpath_enabled(fast_path)
            torch.set_grad_enabled(before)  # again, for an interrupt on the way out

    @contextmanager
    def _widened(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in (self.model, self.criterion):
                if isinstance(module, nn.Module) and self._wide is not None:
                    stack.enter_context(module_state.widened(module, self._wide))
            yield

    def _batch_loss(self, batch: Any) -> Tensor:
        """l_b(w)."""
        return criteria.value(self.criterion, *self._outputs(batch))

    def _outputs(self, batch: Any) -> tuple[Any, Any]:
        """(outputs, target); images have their channels last, which a CPU convolves faster."""
        if (wide := self._wide) is not None:
            is_narrow = lambda x: isinstance(x, Tensor) and x.is_floating_point() and x.itemsize < wide.itemsize  # noqa: E731
            batch = tree_map(lambda x: x.to(wide) if is_narrow(x) else x, batch)
        if self._images_last:
            try:
                return self._for_criterion(*self._forward(self.model, channels_last(batch)))
            except RuntimeError:  # of a view() that needs the other layout; any other error comes again
                self._images_last = False
        return self._for_criterion(*self._forward(self.model, batch))

    def _for_criterion(self, outputs: Any, target: Any) -> tuple[Any, Any]:
        if self.criterion is not None:
            outputs = getattr(outputs, "logits", outputs)
        return (criteria.normalized(outputs) if self.normalize_logits else outputs), target

    def _uses_differences(self) -> bool:
        """As chosen; or, once, as the first examples show: whether double backward is there, and right."""
        if self._second["by differences"] is None:
            self._second["by differences"] = self._sharding.any(self._sharding.together(self._lacks_double_backward))
        return bool(self._second["by differences"])

    def _lacks_double_backward(self) -> bool:
        if not self._batches.sizes:
            return False
        n, batch = self._first(PROBE)
        probe = self._over([divided(batch, n, CHECKED)[0][1]], Sharding(distributed=False))
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
                "autograd function whose backward is no function of torch (once_differentiable, .detach()), or pass "
                "differences=True for products by central differences of gradients"
            )
        return False

    def _in_float64(self) -> Loss | None:
        """The same loss with the weights widened to float64, where w + d is not rounded to the dtype of the model; None
        for a device, a model or a criterion that cannot compute in it."""
        wide = self._copy(_wide=torch.float64, _images_last=False, _second={"by differences": False})
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
    def _by_differences(self, matrix: str, seed: int) -> Iterator[products.Product]:
        """v -> M v where the graphs of the model have no derivative: of gradients, or J v of outputs."""
        wide = self._in_float64() or self._copy(_second={"by differences": False})
        wide._pushes = True
        dtypes = [x.dtype for x in self.zeros()]
        of_matrix = nullcontext(wide._differences()) if matrix == "hessian" else wide.curvature(matrix, seed=seed)
        with wide._widened(), of_matrix as compute:

            def product(v: Sequence[Tensor]) -> list[Tensor]:
                result = compute([x.to(w.dtype) for x, w in zip(v, wide.params, strict=True)])
                self._second["error"] = getattr(compute, "error", None)
                return [x.to(dtype) for x, dtype in zip(result, dtypes, strict=True)]

            yield product

    def _product(self, matrix: str, v: Sequence[Tensor], *, seed: int = 0) -> list[Tensor]:
        with self.curvature(matrix, seed=seed) as product:
            return product(v)

    def _piece_product(self, matrix: str, piece: Any, keep: bool) -> products.Product:
        """v -> M v of one batch, or of a piece of it; for "fisher_mc" of (piece, uniform draws)."""
        piece, uniforms = piece if matrix == "fisher_mc" else (piece, torch.empty(0))
        if self._pushes:  # weights that move make a kept graph stale
            return lambda v: self._product_of(matrix, piece, uniforms, False, self._pushed(matrix, piece, v))(v)
        return self._product_of(matrix, piece, uniforms, keep, None)

    def _product_of(
        self, matrix: str, piece: Any, uniforms: Tensor, keep: bool, pushed: Tensor | None
    ) -> products.Product:
        """pushed: J v for the v that the product is for, where double backward is missing."""
        outputs, target = self._outputs(piece)
        if matrix == "hessian":
            return products.hessian(self.params, criteria.value(self.criterion, outputs, target), keep=keep)
        criteria.check_matrix(self.criterion, outputs, matrix)
        how: dict[str, Any] = {"keep": keep, "push": None if pushed is None else lambda v: pushed}
        if matrix == "ggn" and (rows := self._cross_entropy_rows(outputs, target)) is not None:
            if pushed is not None:
                how["push"] = lambda v: rows_of(pushed)
            return products.fisher(self.params, rows_of(outputs), rows, **how)
        if matrix == "ggn":
            of_outputs = lambda o: criteria.value(self.criterion, o, target)  # noqa: E731
            return products.gauss_newton(self.params, outputs, of_outputs, **how)
        assert self._weigher is not None
        shares = self._weigher.of_examples(outputs, target)
        if matrix == "fisher":
            return products.fisher(self.params, outputs, shares, **how)
        if matrix == "fisher_mc":
            return products.fisher_mc(self.params, outputs, shares, uniforms, **how)
        counted = shares.nonzero().flatten()
        return products.empirical_fisher(
            self.params, self._losses_of_examples(outputs, target, counted), shares[counted], **how
        )

    def _cross_entropy_rows(self, outputs: Tensor, target: Any) -> Tensor | None:
        assert self._weigher is not None
        rows = self._weigher.cross_entropy_rows(target, outputs.shape[1]) if outputs.ndim > 1 else None
        return None if rows is None else rows.to(outputs)

    def _losses_of_examples(self, outputs: Tensor, target: Any, counted: Tensor) -> Tensor:
        """Of those that count: the loss of a label that is ignored is nan."""
        alone = [(outputs[i : i + 1], target[i : i + 1]) for i in counted.tolist()]
        return torch.stack([criteria.value(self.criterion, o, t) for o, t in alone])

    @torch.no_grad()
    def _pushed(self, matrix: str, piece: Any, v: Sequence[Tensor]) -> Tensor:
        """J v of the outputs, or of the losses of single examples, by a central difference."""

        def at(d: Sequence[Tensor]) -> Tensor:
            with self.displaced(d):
                outputs, target = self._outputs(piece)
            if matrix != "empirical_fisher":
                return outputs
            assert self._weigher is not None
            return self._losses_of_examples(outputs, target, self._weigher.of_examples(outputs, target).nonzero()[:, 0])

        h = by_differences.step(self.params, v)
        return (at([h * x for x in v]) - at([-h * x for x in v])) / (2 * h)

    @torch.no_grad()
    def _shares_of_pieces(self, matrix: str, batch: Any, n: int, size: int) -> list[float] | None:
        """s_k for which the matrix of a batch is the sum of s_k times those of its pieces."""
        if self.criterion is None:
            return None
        if matrix == "fisher_mc":
            batch, _ = batch
        divisions = divided(batch, n, size)
        few, _ = self._outputs(part(batch, 0, min(size, PROBE) // 2 or 1))
        first, _ = self._outputs(divisions[0][1])
        if not criteria.same_outputs(few, first):
            return None
        if self._weigher is not None and self._weigher.is_sure:
            weights = [self._weigher(self._target(piece), k) for k, piece in divisions]
            return [w / math.fsum(weights) for w in weights]
        equal = [k / n for k, _ in divisions]
        shares = criteria.shares(self.criterion, [self._outputs(piece) for _, piece in divisions])
        if shares is None:
            return equal if matrix in ("fisher", "fisher_mc", "empirical_fisher") else None  # sums by definition
        if abs(math.fsum(shares) - 1) > 1e-3:
            return None
        return [e if abs(s - e) < 1e-4 * e else s for s, e in zip(shares, equal, strict=True)]


def _convolves_on_cpu(model: nn.Module) -> bool:
    """Convolutions in float32 on the CPU: where images with their channels last are faster, and equal to rounding."""
    return any(
        isinstance(m, nn.Conv2d) and m.weight.dtype == torch.float32 and m.weight.device.type == "cpu"
        for m in model.modules()
    )


def _is_spread(w: Tensor) -> bool:
    """A DTensor: FSDP2, tensor parallelism."""
    return hasattr(w, "full_tensor")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP, whose reducer waits for a backward that never comes, and inside torch.compile, which has
    no double backward."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Compiled submodules, which have no double backward, run as they were before."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _floats(values: list[Tensor]) -> list[float]:
    return torch.stack([v.detach() for v in values]).tolist() if values else []  # one transfer
