"""Models: any timm name, with the stem that the field uses for small images; wide ResNets; two CNNs for a CPU."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core.errors import InputError, one_line, say, unknown
from sam_optim.vision import cifar_resnet, state_dicts, weights, wide_resnet
from sam_optim.vision.tensor_files import read_file

LARGEST = 10**6  # number in the options of a model that is taken from a file
SMALL = 64  # up to this height an image is small: CIFAR, Tiny ImageNet, digits

NAME = re.compile(r"[A-Za-z0-9_.\-]*")  # what cannot be a path or a url

Make = Callable[[int, tuple[int, int, int]], nn.Module]  # of (num_classes, image_size)


def build(
    name: str,
    *,
    num_classes: int,
    image_size: tuple[int, int, int],
    checkpoint: str | None = None,
    small_stem: bool | None = None,
    **options: Any,
) -> nn.Module:
    """A timm model, "cnn3", "cnn5", "wrn28_10" or "cifar_resnet20".

    Args:
        image_size: (C, H, W).
        checkpoint: a file of the model's weights, .safetensors or torch.save's, read without running what it holds.
            timm fits position embeddings and the stem's channels to these images, and makes a new head for another
            number of classes; where small images get another stem, that is new too.
        small_stem: of a timm model: a 3x3 stem of stride 1 without max-pool, or small patches; None: up to 64 pixels.
        options: for timm.create_model, e.g. drop_path_rate; None means the model's default.

    Raises:
        InputError: the name or an option is unknown, or the model cannot take images of this size.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if make := builtin(name):
        if options:
            raise InputError(f"{name} takes no options, got {', '.join(sorted(options))}; choose a timm model for them")
        model = make(num_classes, image_size)
        if checkpoint:
            try:
                model.load_state_dict(weights.without_prefix(_state(checkpoint), model.state_dict()))
            except RuntimeError as error:
                raise InputError(f"--initial-checkpoint {checkpoint} does not fit {name}: {one_line(error)}") from None
        return model
    small = image_size[1] <= SMALL if small_stem is None else small_stem
    options |= _pretrained(name, checkpoint) if checkpoint else {}
    model = _from_timm(name, num_classes, image_size, small, options)
    if small and small_stem_(model) and _fault(model, image_size):
        say(f"note: {name} cannot have the 3x3 stem for small images and keeps its own")
        model = _from_timm(name, num_classes, image_size, small, options)
    if fault := _fault(model, image_size):
        raise InputError(f"{name} cannot take images of size {image_size}: {fault}; set --img-size or choose another")
    return model


def _pretrained(name: str, checkpoint: str) -> dict[str, Any]:
    """Arguments that make timm load weights of a local file as it loads its own; never the averaged ones in it."""
    check_name(name)
    from timm.models import get_pretrained_cfg

    state = _state(checkpoint)
    with torch.device("meta"):
        state = weights.without_prefix(state, _timm().create_model(name).state_dict())
    config = get_pretrained_cfg(name)
    classifier = (config.classifier if config else None) or "head"
    head = classifier if isinstance(classifier, str) else classifier[0]
    classes = len(state.get(f"{head}.weight", ()))
    overlay = {"state_dict": state, "file": None, "url": None, "hf_hub_id": None, "custom_load": False}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay | {"num_classes": classes}}


def _state(checkpoint: str) -> Mapping[str, Tensor]:
    path = Path(checkpoint)
    if not path.is_file():
        raise InputError(f"--initial-checkpoint {checkpoint} is not a file")
    state = state_dicts.choose(read_file(path), path).state
    for key, value in state.items():
        state_dicts.check_values(checkpoint, key, value)
    return state


def checkpoint_gradients_(model: nn.Module, name: str) -> None:
    """Forward passes keep only what stands between the blocks, and are repeated for the backward pass."""
    try:
        checkpointing: Any = model.set_grad_checkpointing
        checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError):
        raise InputError(f"{name} cannot checkpoint its gradients: leave --grad-checkpointing out") from None


def cnn3(num_classes: int, image_size: tuple[int, int, int]) -> nn.Sequential:
    """Three 3x3 convolutions with ReLU, no normalization; the images are halved twice."""
    channels, height, width = image_size
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), num_classes),
    )


def cnn5(num_classes: int, image_size: tuple[int, int, int]) -> nn.Sequential:
    """Five 3x3 convolutions with BatchNorm and ReLU, 72 k parameters: 16, pool, 32, 32, pool, 64, 64, mean."""
    layers: list[nn.Module] = []
    channels = image_size[0]
    for width in (16, None, 32, 32, None, 64, 64):
        if width is None:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


BUILTIN: dict[str, Make] = {"cnn3": cnn3, "cnn5": cnn5}


def builtin(name: str) -> Make | None:
    """Makes a model that timm does not have: `BUILTIN`, wide and CIFAR ResNets; None for every other name."""
    if name in BUILTIN:
        return BUILTIN[name]
    if size := wide_resnet.named(name):
        return lambda num_classes, image_size: wide_resnet.WideResNet(*size, num_classes, image_size[0])
    if blocks := cifar_resnet.named(name):
        return lambda num_classes, image_size: cifar_resnet.ResNet(blocks, num_classes, image_size[0])
    return None


def model_names() -> list[str]:
    """All that can be built, wide ResNets by the example of the SAM paper."""
    return [*BUILTIN, "wrn28_10", "cifar_resnet20", *_timm().list_models()]


def default_size(name: str) -> tuple[int, int]:
    """(H, W) that a timm model was made for; 224 where timm does not say."""
    try:
        from timm.models import get_pretrained_cfg
    except ImportError:
        return (224, 224)
    config = get_pretrained_cfg(name)
    return tuple(config.input_size[1:]) if config else (224, 224)


def data_config(name: str) -> dict[str, Any]:
    """timm's data config of a model: input_size (C, H, W), mean, std, crop_pct, interpolation, crop_mode; timm's
    defaults for a model that is not timm's."""
    from timm.data import resolve_data_config

    return dict(resolve_data_config({"no": None}, pretrained_cfg=_config(name)))


def is_configured(name: str) -> bool:
    """Whether timm has a data config of the model; else `data_config` gives defaults."""
    return bool(_config(name))


def _config(name: str) -> dict[str, Any]:
    check_name(name)
    _timm()
    from timm.models import get_pretrained_cfg

    config = None if builtin(name) else get_pretrained_cfg(name)
    return config.to_dict() if config else {}


def check_name(name: str) -> None:
    """Raises InputError for a name of no model."""
    if not builtin(name) and not _timm().is_model(name):
        raise unknown("model", name, model_names())


def check_options(name: Any, options: Mapping[str, Any]) -> None:
    """Raises InputError for a model or options of a file that could be more than a name and plain values.

    timm.create_model takes paths, urls and hubs: `checkpoint_path` loads a pickle, `pretrained_cfg_overlay` a url.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(f"the model must be a name, got {name!r}")
    check_name(name)
    accepted = _accepted(name) if options and not builtin(name) else frozenset()
    for key, value in options.items():
        if key not in accepted and key not in ("num_classes", "in_chans"):
            raise InputError(f"{name} has no option {key!r} that may be set from a file")
        values = value if isinstance(value, (list, tuple)) else (value,)
        if not all(
            v is None or isinstance(v, (bool, int, float)) or (isinstance(v, str) and NAME.fullmatch(v)) for v in values
        ):
            raise InputError(f"the option {key} must be a number or a word, got {value!r}")
        if any(isinstance(v, (int, float)) and not abs(v) <= LARGEST for v in values):
            raise InputError(f"the option {key} must not be beyond {LARGEST:,}, got {value!r}")
        if key in ("num_classes", "in_chans") and (type(value) is not int or value < 1):
            raise InputError(f"the option {key} must be a positive whole number, got {value!r}")


def num_outputs(name: str, state: Mapping[str, Tensor]) -> int | None:
    """How many classes the model `name` has whose weights are `state`; None if its last layer cannot be identified."""
    with torch.device("meta"):
        make = builtin(name)
        model: nn.Module = make(2, (1, 8, 8)) if make else _timm().create_model(name)
    return weights.num_outputs(model, state)


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise InputError("models and images need timm: pip install 'sam_optim[bench]'") from None
    return timm


def _from_timm(
    name: str, num_classes: int, image_size: tuple[int, int, int], small: bool, options: dict[str, Any]
) -> nn.Module:
    check_name(name)
    arguments = {"num_classes": num_classes, "in_chans": image_size[0]} | _sized(name, image_size, small) | options
    try:
        try:
            return _timm().create_model(name, **arguments)
        except TypeError:  # some entry points fix the patch size themselves (mixer_s16_224)
            if "patch_size" not in arguments:
                raise
            del arguments["patch_size"]
            return _timm().create_model(name, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"{name} cannot be built for images of size {image_size}: {one_line(error)}") from None


@cache
def _accepted(name: str) -> frozenset[str]:
    """The options of the class of a timm model."""
    with torch.device("meta"):
        kind = type(_timm().create_model(name))
    makers = [vars(part)["__init__"] for part in kind.__mro__ if "__init__" in vars(part)]
    return frozenset(parameter for make in makers for parameter in inspect.signature(make).parameters)


def _sized(name: str, image_size: tuple[int, int, int], small: bool) -> dict[str, Any]:
    """img_size where the model's class has it; `small`: also patch_size, an eighth of the height (4 for CIFAR)."""
    accepted = _accepted(name)
    arguments: dict[str, Any] = {}
    if "img_size" in accepted:
        arguments["img_size"] = image_size[1:]
    if small and "patch_size" in accepted:
        arguments["patch_size"] = max(1, image_size[1] // 8) if "img_size" in accepted else 1
    return arguments


def small_stem_(model: nn.Module) -> bool:
    """A strided first convolution becomes 3x3 with stride 1, and the max-pool after it goes. Patches stay (False)."""
    name, old = next(((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if old is None or old.stride == (1, 1) or old.kernel_size == old.stride:
        return False
    bias = old.bias is not None
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, groups=old.groups, bias=bias)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(name, new)
    pool = next((n for n, m in model.named_modules() if isinstance(m, nn.MaxPool2d)), None)
    if pool:
        model.set_submodule(pool, nn.Identity())
    return True


@torch.no_grad()
def _fault(model: nn.Module, image_size: tuple[int, int, int]) -> str | None:
    """Why the model cannot take such images; None if it can."""
    training = model.training
    try:
        model.eval()(torch.zeros(1, *image_size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        return one_line(error)
    finally:
        model.train(training)
    return None
