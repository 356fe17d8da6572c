"""A trained run, opened again: the model of its config.json and newest checkpoint, and its own data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.train import checkpoint, data, recipe
from benchmarks.train.batches import batches
from benchmarks.train.data import Examples, Splits
from benchmarks.train.epoch import Batch
from benchmarks.train.options import Options
from benchmarks.train.order import Loading
from benchmarks.train.streams import Streamed
from sam_optim.core import random as rng
from sam_optim.core.errors import InputError
from sam_optim.vision.weights import limited, load_


@dataclass(frozen=True)
class TrainedRun:
    """weights: "model" or "ema", the averaged ones. updates: after how many."""

    options: Options
    splits: Splits
    model: nn.Module
    device: torch.device
    weights: str
    updates: int

    def split(self, name: str) -> Examples | Streamed:
        examples = getattr(self.splits, name)
        if examples is None:
            raise InputError("the run has no validation split: choose --split train or test")
        return examples

    def batches(self, examples: Examples | Streamed, batch_size: int, num: int = 0) -> Iterator[Batch]:
        """`num` examples in order, without augmentation, as `data.some` takes them; 0 for all."""
        chosen = data.some(examples, num)
        left = min(num or len(chosen), len(chosen))
        loading = Loading(workers=self.options.workers)
        for x, y in batches(chosen, min(batch_size, left), self.splits.preprocessing, loading=loading):
            yield x[:left], y[:left]
            left -= len(y)
            if left <= 0:
                return


def load(options: Options, *, ema: bool = False) -> TrainedRun:
    state = checkpoint.newest(options.out / "checkpoints")
    weights = "ema" if ema else "model"
    if state[weights] is None:
        raise InputError(f"{options.out} was trained without --model-ema: leave --ema out")
    device = recipe.device(options)
    with rng.preserved():
        splits = data.load(options)
        with limited(state[weights], str(options.out)):
            model = recipe.model(options, splits)
    load_(model, state[weights], str(options.out))
    return TrainedRun(options, splits, model.to(device), device, weights, state["step"])
