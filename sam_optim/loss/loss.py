"""The loss of a model over fixed batches as a function of its weights: value, gradient and curvature products."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_optim.core import module_state as batchnorm
from sam_optim.core import random as rng
from sam_optim.loss import curvature as chunks
from sam_optim.loss import products
from sam_optim.loss.batches import FixedBatches, channels_last, combined, moved
from sam_optim.loss.convolutions import CheapSecondDerivatives
from sam_optim.loss.distributed import Shares

MATRICES = ("hessian", "ggn", "fisher", "empirical_fisher")
SAMPLED = ("fisher_mc",)  # an estimate of one of them, by draws

Criterion = Callable[[Any, Any], Tensor]
Forward = Callable[[nn.Module, Any], tuple[Any, Any]]
T = TypeVar("T")


class Loss:
    """L(w) = sum_b n_b / N l_b(w),   l_b = criterion(model(x_b), y_b), the mean over the n_b examples of batch b.

    The batches are the same in every pass: what a pass yields is compared with what the first one gave, and a
    difference is an error. The model is measured in eval mode, without dropout, and left exactly as found: weights,
    buffers, modes, `p.grad`, and the global generators, also after an exception. Attention runs on the mathematical
    backend in second-order products, the only one with double backward.

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
            where the loss is not the mean over pieces: batch statistics, weights of classes, ignored labels.

    Attributes:
        params: the trainable parameters, in the order of `model.parameters()`; vectors are lists in their shapes.
        blocks: the names that `block` restricted them to; None is all.
        batch_sizes: n_b of each batch (as in `FixedBatches`), of all ranks. num_batches: how many. num_examples: N,
            their sum.

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
    ):
        _check_criterion(criterion, normalize_logits)
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
        self.device = torch.device(device) if device is not None else self.params[0].device
        self._forward = forward or _default_forward
        self._images_last = _convolves_on_cpu(self.model)
        self._shares = Shares(distributed)
        self._batches = self._shares.together(lambda: FixedBatches(batches, may_be_empty=not self._shares.is_one))
        self._shares.check(self._batches.found, self.params)
        self._found = self._shares.dealt(self._batches.found)
        self.batch_sizes = tuple(n for n, _ in self._found)
        if not self.batch_sizes:
            raise ValueError("a loss needs batches with examples in them, and no rank has any")
        self.num_batches = len(self.batch_sizes)
        self.num_examples = sum(self.batch_sizes)

    def value(self) -> Tensor:
        """L(w), 0-d float64 on the CPU."""
        return self._mean(self.batch_values())

    def batch_values(self) -> Tensor:
        """l_b(w) of each batch, (num_batches,) float64 on the CPU."""

        def own() -> list[float]:
            with self._evaluating(grad=False):
                return _stack([self._batch_loss(batch) for _, batch in self._weighted_batches()]).tolist()

        return torch.tensor(self._shares.dealt(self._shares.together(own)), dtype=torch.float64)

    def value_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """L(w), 0-d float64, and dL/dw in the shapes of `params`; 0 for a parameter that L does not depend on."""
        values: list[Tensor] = []

        def own() -> list[Tensor]:
            with self._evaluating(grad=True):
                total = chunks.Sum(self.params)
                for weight, batch in self._weighted_batches():
                    loss = self._batch_loss(batch)
                    total.add(torch.autograd.grad(loss, self.params, materialize_grads=True), weight)
                    values.append(loss.detach())
            return total.tensors

        gradient = self._shares.summed(own)
        dealt = self._shares.dealt(_stack(values).tolist())
        return self._mean(torch.tensor(dealt, dtype=torch.float64)), gradient

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
        with self._evaluating(grad=True), sdpa_kernel(SDPBackend.MATH):
            yield chunks.Curvature(self, matrix, seed)

    def block(self, *names: str) -> Loss:
        """The same loss as a function of some parameters alone, the others fixed: those whose name in the model is one
        of `names`, or begins with one and a dot ("layer1": all of that layer). Curvature becomes that block of it."""
        own = self.parameter_names()
        for n in names:
            if not any(name == n or name.startswith(f"{n}.") for name in own):
                raise ValueError(f"no parameter of this loss is {n!r} or in it; there are {', '.join(own)}")
        if not names:
            raise ValueError("a block needs the name of a parameter or module")
        found = copy.copy(self)
        pairs = zip(own, self.params, strict=True)
        found.params = [p for name, p in pairs if any(name == n or name.startswith(f"{n}.") for n in names)]
        found.blocks = names
        return found

    def parameter_names(self) -> list[str]:
        """Names in the model, in the order of `params`."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [names[id(p)] for p in self.params]

    def over_batches(self, f: Callable[[Loss], T]) -> list[T]:
        """f of the Loss over each batch alone, the unit of m-sharpness, in the order of `batch_sizes`.

        Each rank calls f for the batches of its own, and all get all results: numbers, tensors, or tuples, lists and
        mappings of them. An error on one rank is one on all.
        """
        return self._shares.dealt_together(lambda: [f(single) for single in self.single_batches()], self.device)

    def single_batches(self) -> Iterator[Loss]:
        """A Loss over each batch alone, of this rank; see `over_batches`."""
        for _, batch in self._weighted_batches():
            yield self._over([batch], distributed=False)

    def split(self, size: int) -> Loss:
        """The same function of the weights over batches of at most `size` examples: another m of m-sharpness.

        Raises:
            ValueError: size < 1, or a batch whose tensors do not all begin with its examples.
        """
        if size < 1:
            raise ValueError(f"size counts examples and must be >= 1, got {size}")
        pieces: list[Any] = []
        for n, (_, batch) in zip(self._batches.sizes, self._weighted_batches(), strict=True):
            found = chunks.divided(batch, n, size)
            if len(found) < -(-n // size):
                raise ValueError("this batch cannot be split: not all of its tensors begin with its examples")
            pieces += [piece for _, piece in found]
        return self._over(pieces, distributed=not self._shares.is_one)

    def _over(self, batches: list[Any], *, distributed: bool) -> Loss:
        found = Loss(
            self.model,
            self.criterion,
            batches,
            forward=self._forward,
            normalize_logits=self.normalize_logits,
            batch_statistics=self.batch_statistics,
            device=self.device,
            distributed=distributed,
            chunk_size=self.chunk_size,
        )
        found.params, found.blocks = self.params, self.blocks
        return found

    @contextmanager
    def displaced(self, d: Sequence[Tensor]) -> Iterator[None]:
        """The weights at w + d, d in the shapes of `params`. They come back bit for bit in the same storage, never by
        subtraction, whatever happens inside."""
        if (got := [tuple(x.shape) for x in d]) != [tuple(w.shape) for w in self.params]:
            raise ValueError(f"d needs one tensor for each parameter, of its shape (see `params`), got shapes {got}")
        grad = torch.is_grad_enabled()
        saved = [w.detach().clone() for w in self.params]

        def restore() -> None:
            torch.set_grad_enabled(False)
            for w, s in zip(self.params, saved, strict=True):
                w.copy_(s)
            torch.clear_autocast_cache()
            torch.set_grad_enabled(grad)

        try:
            with torch.no_grad():
                for w, x in zip(self.params, d, strict=True):
                    w.add_(x)
            torch.clear_autocast_cache()  # or an enclosing autocast region would go on using the weights at w
            yield
        finally:
            try:
                restore()
            except BaseException:  # an interrupt on the way back
                restore()
                raise

    def settings(self) -> dict[str, Any]:
        """What a result has to say about its loss: m and n in examples, and which function of w it is."""
        return {
            "m": max(self.batch_sizes),
            "n": self.num_examples,
            "num_batches": self.num_batches,
            "num_parameters": sum(w.numel() for w in self.params),
            "batch_norm": batchnorm.statistics_in_use(self.model, batch_statistics=self.batch_statistics),
            "normalize_logits": self.normalize_logits,
            "parameters": None if self.blocks is None else list(self.blocks),
            "dtype": str(self.params[0].dtype).removeprefix("torch."),
            "device": self.device.type,
            "data": combined(self._found),
        }

    def _weighted_batches(self) -> Iterator[tuple[float, Any]]:
        """(n_b / N, batch on the device) for each batch of this rank."""
        for n, batch in zip(self._batches.sizes, self._batches, strict=True):
            yield n / self.num_examples, moved(batch, self.device)

    @contextmanager
    def _evaluating(self, *, grad: bool) -> Iterator[None]:
        cuda = [self.device] if self.device.type == "cuda" else []
        measured = batchnorm.measured(self.model, batch_statistics=self.batch_statistics)
        kept, aside = rng.kept(cuda), rng.Aside(0, cuda)  # a model that draws in eval mode draws the same in every pass
        before = torch.is_grad_enabled()
        try:
            with kept, measured, aside, torch.inference_mode(False), torch.set_grad_enabled(grad):
                yield
        finally:
            torch.set_grad_enabled(before)  # again, for an interrupt on the way out

    def _outputs(self, batch: Any) -> tuple[Any, Any]:
        """(outputs, target); of images with their channels last, which a CPU convolves faster."""
        if self._images_last:
            try:
                return self._of_criterion(*self._forward(self.model, channels_last(batch)))
            except RuntimeError:  # of a view() that needs the other layout; any other error comes again
                self._images_last = False
        return self._of_criterion(*self._forward(self.model, batch))

    def _batch_loss(self, batch: Any) -> Tensor:
        """l_b(w)."""
        return self._criterion_value(*self._outputs(batch))

    def _of_criterion(self, outputs: Any, target: Any) -> tuple[Any, Any]:
        if self.criterion is not None:
            outputs = getattr(outputs, "logits", outputs)
        return (_normalized(outputs) if self.normalize_logits else outputs), target

    def _criterion_value(self, outputs: Any, target: Any) -> Tensor:
        loss = outputs.loss if self.criterion is None else self.criterion(outputs, target)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"criterion must return the mean over the batch, a 0-d tensor, got {got}; {_A_MEAN}")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError("the loss does not depend on the trainable parameters: is there a detach() or no_grad()?")
        return loss

    def _product(self, matrix: str, v: Sequence[Tensor], *, seed: int = 0) -> list[Tensor]:
        with self.curvature(matrix, seed=seed) as product:
            return product(v)

    def _piece_product(self, matrix: str, piece: Any, uniforms: Tensor, *, keep: bool) -> products.Product:
        """v -> M v of one batch, or of a piece of it. uniforms: (n,) on [0, 1), for labels to be drawn."""
        with CheapSecondDerivatives():
            return self._product_of(matrix, *self._outputs(piece), uniforms, keep=keep)

    def _product_of(self, matrix: str, outputs: Any, target: Any, uniforms: Tensor, *, keep: bool) -> products.Product:
        if matrix == "hessian":
            return products.hessian(self.params, self._criterion_value(outputs, target), keep=keep)
        if self.criterion is None or not isinstance(outputs, Tensor):
            got = "no criterion" if self.criterion is None else f"outputs of type {type(outputs).__name__}"
            remedy = "pass one, such as nn.CrossEntropyLoss(), or use matrix='hessian'"
            raise ValueError(f"matrix={matrix!r} needs a criterion of outputs that are one tensor, got {got}: {remedy}")
        if matrix == "ggn":
            return products.gauss_newton(self.params, outputs, lambda o: self._criterion_value(o, target), keep=keep)
        if matrix in ("fisher", "fisher_mc"):
            _check_categorical(self.criterion, outputs, matrix)
            if matrix == "fisher":
                return products.fisher(self.params, outputs, keep=keep)
            return products.fisher_mc(self.params, outputs, uniforms, keep=keep)
        losses = [self._criterion_value(outputs[i : i + 1], target[i : i + 1]) for i in range(len(outputs))]
        return products.empirical_fisher(self.params, torch.stack(losses), keep=keep)

    def _mean(self, values: Tensor) -> Tensor:
        sizes = torch.tensor(self.batch_sizes, dtype=torch.float64)
        return (values * sizes).sum() / self.num_examples


def _convolves_on_cpu(model: nn.Module) -> bool:
    """Convolutions in float32 on the CPU: where images with their channels last are faster, and equal to rounding."""
    return any(
        isinstance(m, nn.Conv2d) and m.weight.dtype == torch.float32 and m.weight.device.type == "cpu"
        for m in model.modules()
    )


_A_MEAN = "use reduction='mean' (batches are weighted by their size), or add .mean()"


def _default_forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return model(**batch), batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        *inputs, target = batch
        return model(*inputs), target
    got = f"a mapping of {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(f"a batch is (inputs..., target) or a mapping with 'labels', got {got}: pass forward=")


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


def _check_criterion(criterion: Any, normalize_logits: bool) -> None:
    if criterion is None and normalize_logits:
        raise ValueError("normalize_logits=True needs a criterion of the logits: `outputs.loss` is made of raw ones")
    if criterion is not None and not callable(criterion):
        raise ValueError(f"criterion must be a callable (outputs, target) -> mean loss, or None, got {criterion!r}")
    reduction = getattr(criterion, "reduction", getattr(criterion, "keywords", {}).get("reduction", "mean"))
    if reduction in ("sum", "none"):
        raise ValueError(f"criterion must return the mean over the batch, got reduction={reduction!r}; {_A_MEAN}")


def _check_categorical(criterion: Any, outputs: Tensor, matrix: str) -> None:
    other = isinstance(criterion, nn.modules.loss._Loss) and not isinstance(criterion, nn.CrossEntropyLoss)
    if other or outputs.ndim != 2:
        got = f"{type(criterion).__name__} of outputs of shape {tuple(outputs.shape)}"
        raise ValueError(f"matrix={matrix!r} is that of softmax(outputs), (n, K), got {got}; use matrix='ggn'")


def _normalized(outputs: Any) -> Tensor:
    """(o - mean o) / ||o - mean o||_2 for each example (arXiv:2302.07011)."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"normalize_logits=True needs outputs of shape (n, K), K >= 2, got {got}")
    centred = outputs - outputs.mean(dim=1, keepdim=True)
    return centred / torch.linalg.vector_norm(centred, dim=1, keepdim=True).clamp(min=1e-10)


def _stack(values: list[Tensor]) -> Tensor:
    if not values:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([v.detach() for v in values]).cpu().double()  # one transfer; not every device has float64
