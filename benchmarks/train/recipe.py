"""Builds model, optimizer and schedule from the options of a run, for training and measuring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import sam_optim
from benchmarks.train.batches import Augment
from benchmarks.train.data import Splits
from benchmarks.train.options import SAM_VARIANTS, Options
from benchmarks.train.order import derive, seed_all
from benchmarks.train.ranks import ALONE, World, named
from sam_optim import SAM, asam_param_groups, norm_only_param_groups
from sam_optim.core.errors import InputError, one_line, unknown
from sam_optim.vision import models

SAM_SCHEDULES = ("late_phase", "periodic", "warmup", "proportional_to_lr")
FAULTS = (RuntimeError, AssertionError, ValueError, TypeError, KeyError, AttributeError, ImportError)


def device(options: Options, world: World = ALONE) -> torch.device:
    """The device of the options, with "auto" resolved; each of several CUDA processes has its own."""
    try:
        chosen = torch.device(named(options.device))
        if world.size > 1 and chosen.type == "cuda":
            chosen = torch.device("cuda", torch.cuda.current_device())
        torch.empty(1, device=chosen).item()
    except (*FAULTS, NotImplementedError) as error:
        reason = one_line(error)
        raise InputError(f"--device {options.device} cannot be used here ({reason}); try --device cpu") from None
    return chosen


def augmentation(options: Options) -> Augment | None:
    """Digits are not augmented: a mirrored 2 is no digit."""
    if options.data == "digits":
        if options.aa or options.color_jitter or options.reprob:
            raise InputError("--aa, --color-jitter and --reprob are for photographs; digits are not augmented")
        return None
    if options.no_aug:
        return None
    return Augment(
        hflip=0.0 if "mnist" in options.data else options.hflip,
        auto_augment=options.aa,
        color_jitter=options.color_jitter,
        erase=options.reprob,
        scale=options.crop_scale,
    )


def model(options: Options, splits: Splits, *, initial: bool = False) -> nn.Module:
    """Initialized by --seed alone, whatever ran before; with `initial` from --initial-checkpoint, if there is one."""
    seed_all(derive(options.seed, "model"))
    network = models.build(
        options.model,
        num_classes=splits.num_classes,
        image_size=splits.image_size,
        checkpoint=options.initial_checkpoint if initial else None,
        **options.model_kwargs,
    )
    if options.grad_checkpointing:
        models.checkpoint_gradients_(network, options.model)
    return network.to(memory_format=torch.channels_last) if options.channels_last else network


def optimizer(
    options: Options, network: nn.Module, module: nn.Module | None = None, *, num_updates: int = 0
) -> torch.optim.Optimizer:
    """timm's optimizer, with SAM or its variant around it where --sam-rho is not 0.

    module: the model as it is called, in its DDP wrapper if it has one. num_updates: of the run, for --sam-schedule.
    """
    base = _base(options, network)
    if not options.sam_rho:
        return base
    if options.adaptive:
        split_groups_(base, asam_param_groups(network, adaptive=options.adaptive))
    arguments = dict(options.sam_kwargs)
    if options.sam_schedule:
        arguments["schedule"] = sam_schedule(options.sam_schedule, num_updates)
    try:
        if options.sam_norm_only:
            split_groups_(base, norm_only_param_groups(network))
        return variant(options.sam_variant).wrap(
            base,
            rho=options.sam_rho,
            adaptive=options.adaptive or False,
            eta=options.sam_eta,
            norm=float(options.sam_norm),
            module=network if module is None else module,
            sync_ascent=True if options.sync_ascent else None,
            **arguments,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"--opt {options.opt} cannot be the base of SAM: {one_line(error)}") from None


def variant(name: str | None) -> type[SAM]:
    """The class of --sam-variant."""
    return getattr(sam_optim, SAM_VARIANTS[name]) if name else SAM


def sam_schedule(text: str, num_updates: int) -> Callable[[int], float]:
    """NAME:NUMBER[:NUMBER], a schedule of the package; numbers of steps below 1 are shares of `num_updates`."""
    name, *numbers = text.split(":")
    if name not in SAM_SCHEDULES:
        raise unknown("schedule of --sam-schedule", name, SAM_SCHEDULES)
    try:
        values = [float(n) for n in numbers]
        if name != "proportional_to_lr":
            values = [round(v * num_updates) if 0 < v < 1 else int(v) for v in values]
        return getattr(sam_optim, name)(*values)
    except (ValueError, TypeError) as error:
        raise InputError(f"--sam-schedule {text}: {one_line(error)}; give e.g. late_phase:0.7") from None


def _base(options: Options, network: nn.Module) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    prefix, _, name = options.opt.rpartition(
        "_"
    )  # timm looks up the last piece only: "sam_sgd" would silently be "sgd"
    if name not in list_optimizers() or prefix not in ("", "lookahead"):
        raise unknown("optimizer", options.opt, list_optimizers())
    if options.layer_decay is not None and not hasattr(network, "group_matcher"):
        raise InputError(
            f"--layer-decay needs the layer groups of a timm model, and {options.model} has none: leave it out, or "
            "choose another --model"
        )
    if get_optimizer_info(name).second_order:
        raise InputError(
            f"--opt {options.opt} needs second derivatives in every step, which this loop does not compute"
        )
    try:
        return create_optimizer_v2(
            network,
            options.opt,
            lr=options.lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            layer_decay=options.layer_decay,
            filter_bias_and_bn=not options.decay_all,
            **options.opt_kwargs,
        )
    except FAULTS as error:
        raise InputError(f"--opt {options.opt} cannot be created: {one_line(error)}") from None


def split_groups_(base: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Splits timm's groups (weight decay, layer decay) by those of `groups`, whose settings the parts take."""
    settings = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    where = {id(p): i for i, g in enumerate(groups) for p in g["params"]}
    base.param_groups[:] = [  # in place: Lookahead shares the list with its own base
        {**group, "params": params, **added}
        for group in base.param_groups
        for i, added in enumerate(settings)
        if (params := [p for p in group["params"] if where[id(p)] == i])
    ]


class Plateau:
    """The learning rates fall by --decay-rate when the loss has not for --patience-epochs; torch's, which has a state.

    The loss is that of the validation split, in the epochs that evaluate it, else that of training.
    (timm's is deprecated, and cannot be resumed.)
    """

    def __init__(self, options: Options, optimizer: torch.optim.Optimizer):
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)  # of --layer-decay, which timm's schedules multiply by
        self.inner = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=options.decay_rate, patience=options.patience_epochs, min_lr=options.min_lr
        )
        self.epoch = self.inner.step
        self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict

    def __call__(self, update: int) -> None:
        """Nothing changes within an epoch."""


def scheduler(options: Options, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Callable[[int], None]:
    """Sets the learning rates for update number n. timm's schedules are functions of n, there is no state to save; only
    `Plateau` has one, and its `epoch` takes the loss that it follows."""
    from timm.scheduler import create_scheduler_v2

    if options.sched == "plateau":
        if options.decay_rate >= 1:
            raise InputError(f"--decay-rate must be < 1 for --sched plateau, got {options.decay_rate:g}")
        return Plateau(options, optimizer)
    if options.warmup_epochs >= options.epochs and options.warmup_epochs:
        raise InputError(f"--warmup-epochs {options.warmup_epochs:g} leaves nothing of --epochs {options.epochs}")
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=options.sched,
            num_epochs=options.epochs,
            warmup_epochs=options.warmup_epochs,
            warmup_lr=options.lr / 100,
            min_lr=options.min_lr,
            decay_milestones=[options.epochs // 2, options.epochs * 3 // 4],
            decay_epochs=None if options.sched in ("wsd", "rsqrt") else max(1, options.epochs // 3),
            decay_rate=1.0 if options.sched == "poly" else options.decay_rate,  # of poly it is the power
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except FAULTS as error:
        raise InputError(f"--sched {options.sched} cannot be created: {one_line(error)}") from None
    if schedule is not None:
        return schedule.step_update
    if options.sched not in ("constant", "none"):
        raise InputError(f"--sched {options.sched} is unknown to this timm: use another one, or upgrade timm")
    return lambda n: None


def mixup(options: Options, num_classes: int) -> Any:
    """timm's, also where only one of --mixup and --cutmix is given; None without both."""
    if not (options.mixup or options.cutmix):
        return None
    from timm.data import Mixup

    return Mixup(options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=num_classes)
