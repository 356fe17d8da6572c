"""From the options of a run to its data, model, optimizer and schedule: the same objects for training and measuring."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.command import InputError, one_line, unknown
from benchmarks.train import data, models
from benchmarks.train.images import Augment
from benchmarks.train.order import derive, seed_all
from benchmarks.train.preprocessing import NAMES, Preprocessing
from benchmarks.train.ranks import ALONE, World, named
from sam_optim import SAM, asam_param_groups

FAULTS = (RuntimeError, AssertionError, ValueError, TypeError, KeyError, AttributeError, ImportError)


def device(args: argparse.Namespace, world: World = ALONE) -> torch.device:
    """That of the options, "auto" resolved; of several CUDA processes each has its own."""
    try:
        found = torch.device(named(args.device))
        if world.size > 1 and found.type == "cuda":
            found = torch.device("cuda", torch.cuda.current_device())
        torch.empty(1, device=found).item()
    except (*FAULTS, NotImplementedError) as error:
        raise InputError(f"--device {args.device} cannot be used here ({one_line(error)}); try --device cpu") from None
    return found


def splits(args: argparse.Namespace) -> data.Splits:
    return data.load(
        args.data,
        args.data_dir,
        label_noise=args.label_noise,
        train_labels=args.train_labels,
        seed=args.seed,
        validation_fraction=args.validation_fraction,
        num_train=args.train_examples,
        image_size=args.img_size,
        default_size=models.default_size(args.model),
        num_classes=args.num_classes,
        preprocessing=Preprocessing(*(getattr(args, name) for name in NAMES)),
    )


def augmentation(args: argparse.Namespace) -> Augment | None:
    """Digits are not augmented: a mirrored 2 is no digit."""
    if args.data == "digits":
        if args.aa or args.color_jitter or args.reprob:
            raise InputError("--aa, --color-jitter and --reprob are for photographs; digits are not augmented")
        return None
    return Augment(
        hflip=0.0 if "mnist" in args.data else args.hflip,
        auto_augment=args.aa,
        color_jitter=args.color_jitter,
        erase=args.reprob,
        scale=args.crop_scale,
        off=args.no_aug,
    )


def model(args: argparse.Namespace, found: data.Splits, *, initial: bool = False) -> nn.Module:
    """Initialised by --seed alone, whatever ran before; with `initial` from --initial-checkpoint, if there is one."""
    seed_all(derive(args.seed, "model"))
    made = models.build(
        args.model,
        num_classes=found.num_classes,
        image_size=found.image_size,
        checkpoint=args.initial_checkpoint if initial else None,
        **dict(args.model_kwargs),
    )
    if args.grad_checkpointing:
        models.checkpoint_gradients_(made, args.model)
    return made.to(memory_format=torch.channels_last) if args.channels_last else made


def optimizer(args: argparse.Namespace, network: nn.Module, module: nn.Module | None = None) -> torch.optim.Optimizer:
    """timm's optimizer, with SAM around it where --sam-rho is not 0.

    module: the model as it is called, in its DDP wrapper if it has one.
    """
    base = _base(args, network)
    if not args.sam_rho:
        return base
    if args.adaptive:
        split_groups_(base, network, args.adaptive)
    try:
        return SAM.wrap(
            base,
            rho=args.sam_rho,
            adaptive=args.adaptive or False,
            eta=args.sam_eta,
            norm=float(args.sam_norm),
            module=network if module is None else module,
            sync_ascent=True if args.sync_ascent else None,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"--opt {args.opt} cannot be the base of SAM: {one_line(error)}") from None


def _base(args: argparse.Namespace, network: nn.Module) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    prefix, _, name = args.opt.rpartition("_")  # timm looks up the last piece only: "sam_sgd" would silently be "sgd"
    if name not in list_optimizers() or prefix not in ("", "lookahead"):
        raise unknown("optimizer", args.opt, list_optimizers())
    if args.layer_decay is not None and not hasattr(network, "group_matcher"):
        raise InputError(
            f"--layer-decay needs the layer groups of a timm model, and {args.model} has none: leave it out, or choose "
            "another --model"
        )
    if get_optimizer_info(name).second_order:
        raise InputError(f"--opt {args.opt} needs second derivatives in every step, which this loop does not make")
    try:
        return create_optimizer_v2(
            network,
            args.opt,
            lr=args.lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            layer_decay=args.layer_decay,
            filter_bias_and_bn=not args.decay_all,
            **dict(args.opt_kwargs),
        )
    except FAULTS as error:
        raise InputError(f"--opt {args.opt} cannot be made: {one_line(error)}") from None


def split_groups_(base: torch.optim.Optimizer, network: nn.Module, adaptive: str) -> None:
    """Each of timm's groups (weight decay, layer decay) in two: T = 1 for biases and normalisation parameters."""
    scaled = {id(p) for g in asam_param_groups(network, adaptive=adaptive) if g["adaptive"] for p in g["params"]}
    result = []
    for group in base.param_groups:
        for value in (False, adaptive):
            params = [p for p in group["params"] if (id(p) in scaled) == bool(value)]
            if params:
                result.append({**group, "params": params, "adaptive": value})
    base.param_groups[:] = result  # in place: Lookahead shares the list with its own base


class Plateau:
    """The learning rates fall by --decay-rate when the loss has not for --patience-epochs; torch's, which has a state.

    The loss is that of the validation split, in the epochs that evaluate it, else that of training.
    (timm's is deprecated, and cannot be resumed.)
    """

    def __init__(self, args: argparse.Namespace, made: torch.optim.Optimizer):
        for group in made.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)  # of --layer-decay, which timm's schedules multiply by
        self.inner = torch.optim.lr_scheduler.ReduceLROnPlateau(
            made, factor=args.decay_rate, patience=args.patience_epochs, min_lr=args.min_lr
        )

    def __call__(self, update: int) -> None:
        """Nothing changes within an epoch."""

    def epoch(self, loss: float) -> None:
        self.inner.step(loss)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def scheduler(args: argparse.Namespace, made: torch.optim.Optimizer, updates_per_epoch: int) -> Callable[[int], None]:
    """Sets the learning rates for update number n. timm's schedules are functions of n, there is no state to save; only
    `Plateau` has one, and its `epoch` takes the loss that it follows."""
    from timm.scheduler import create_scheduler_v2

    if args.sched == "plateau":
        if args.decay_rate >= 1:
            raise InputError(f"--decay-rate must be < 1 for --sched plateau, got {args.decay_rate:g}")
        return Plateau(args, made)
    if args.warmup_epochs >= args.epochs and args.warmup_epochs:
        raise InputError(f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}")
    try:
        schedule, _ = create_scheduler_v2(
            made,
            sched=args.sched,
            num_epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            warmup_lr=args.lr / 100,
            min_lr=args.min_lr,
            decay_milestones=[args.epochs // 2, args.epochs * 3 // 4],
            decay_epochs=None if args.sched in ("wsd", "rsqrt") else max(1, args.epochs // 3),
            decay_rate=1.0 if args.sched == "poly" else args.decay_rate,  # of poly it is the power
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except FAULTS as error:
        raise InputError(f"--sched {args.sched} cannot be made: {one_line(error)}") from None
    return schedule.step_update if schedule is not None else lambda n: None


def mixup(args: argparse.Namespace, num_classes: int) -> Any:
    """timm's, also where only one of --mixup and --cutmix is given; None without both."""
    if not (args.mixup or args.cutmix):
        return None
    from timm.data import Mixup

    return Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)
