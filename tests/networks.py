"""Small float64 networks with everything that makes curvature hard, and dense matrices from double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_optim.loss import Loss

CLASSES = 3
Batch = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Two tokens' worth of a transformer: embedding, scaled dot-product attention, LayerNorm, GELU, a skip."""

    def __init__(self, width: int = 4, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(3, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + mixed.transpose(1, 2).reshape(n, tokens, width)
        return self.head(nn.functional.gelu(self.norm(x)).mean(dim=1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, CLASSES))


def cnn() -> nn.Module:
    """Convolution, BatchNorm and ReLU in place."""
    body = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(12, CLASSES))


SHAPES = {mlp: (4,), cnn: (1, 4, 4), Attention: (5, 3)}
NETWORKS = list(SHAPES)


def network(kind: type[nn.Module] | object, *, seed: int = 0) -> nn.Module:
    """The network in float64, its normalization layers away from their initial values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind().double()
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.3)
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.running_var, 0.5, 2.0)
    return model


def batches(kind: object, sizes: tuple[int, ...] = (5, 5, 2), *, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(n, *SHAPES[kind], generator=generator, dtype=torch.float64) for n in sizes]
    return [(x, torch.randint(CLASSES, (len(x),), generator=generator)) for x in draw]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def like(v: Tensor, params: list[Tensor]) -> list[Tensor]:
    return [x.view(p.shape) for x, p in zip(v.split([p.numel() for p in params]), params, strict=True)]


class OfMatrix(Loss):
    """A loss whose curvature is a given matrix, or a function v -> A v: thousands of products in a second."""

    def __init__(self, a: Tensor | Callable[[Tensor], Tensor], *, dimension: int | None = None):
        model = nn.Linear(dimension or len(a), 1, bias=False).double()
        super().__init__(model, lambda o, y: o.mean(), [(torch.zeros_like(model.weight), torch.zeros(1))])
        self.matrix = a

    @contextmanager
    def curvature(self, matrix: str = "hessian", *, seed: int = 0) -> Iterator[Callable[[list[Tensor]], list[Tensor]]]:
        multiply = self.matrix if callable(self.matrix) else self.matrix.matmul
        yield lambda v: [multiply(v[0].flatten()).view_as(v[0])]


class Dense:
    """Gradient and curvature of the mean loss over one batch as a function of flat weights: double backward alone."""

    def __init__(self, model: nn.Module, criterion: object, batch: Batch):
        self.model, self.criterion, (self.x, self.y) = model, criterion, batch
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.named = {name: dict(model.named_parameters())[name].detach() for name in names}
        self.w = flat(list(self.named.values()))

    def outputs(self, w: Tensor) -> Tensor:
        weights = dict(zip(self.named, like(w, list(self.named.values())), strict=True))
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        return functional_call(self.model, weights | buffers, (self.x,))

    def losses(self, w: Tensor) -> Tensor:
        """Of each example, (n,)."""
        outputs = self.outputs(w)
        return torch.stack([self.criterion(outputs[i : i + 1], self.y[i : i + 1]) for i in range(len(outputs))])

    def loss(self, w: Tensor) -> Tensor:
        return self.criterion(self.outputs(w), self.y)

    def matrix(self, name: str) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            if name == "hessian":
                return torch.autograd.functional.hessian(self.loss, self.w)
            if name == "empirical_fisher":
                j = torch.autograd.functional.jacobian(self.losses, self.w)
                return j.T @ j / len(j)
            j = torch.autograd.functional.jacobian(self.outputs, self.w)
            n, k, p = j.shape
            o = self.outputs(self.w).detach()
            if name == "ggn":
                h = torch.autograd.functional.hessian(lambda o: self.criterion(o, self.y), o).view(n * k, n * k)
                return j.view(n * k, p).T @ h @ j.view(n * k, p)
            q = o.softmax(dim=1)
            return sum(a.T @ (torch.diag(b) - torch.outer(b, b)) @ a for a, b in zip(j, q, strict=True)) / n
