"""Loads weights into a model: removes the prefixes of wrappers from names, and names what does not fit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sam_optim.core.errors import InputError

AVERAGED = re.compile(r"ema|averag|swa", re.IGNORECASE)
LARGE, MANY = 10**8, 10_000  # weights, and tensors of weights, that a model may have beyond those of its checkpoint
OPTIONAL = "num_batches_tracked"  # old checkpoints lack it, and nothing that is measured depends on it


def load_(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Loads a state that fits the model. name: of the checkpoint, for errors."""
    with torch.no_grad():
        model.load_state_dict(fitted(model, state, name), strict=False)  # only optional entries can be missing


@contextmanager
def limited(state: Mapping[str, Tensor], name: str) -> Iterator[None]:
    """Raises InputError as soon as a model that is made inside is far larger than the checkpoint beside its config."""
    given, claimed, tensors = sum(w.numel() for w in state.values()), 0, 0

    def count(module: nn.Module, parameter: str, w: Tensor | None) -> None:
        nonlocal claimed, tensors
        claimed, tensors = claimed + (0 if w is None else w.numel()), tensors + 1
        if claimed > given + LARGE or tensors > 2 * len(state) + MANY:
            said = f"{name} has {given:,} numbers in {len(state)} tensors, and its config.json describes a larger model"
            raise InputError(said)

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def fitted(model: nn.Module, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state under the model's names.

    Raises:
        InputError: a weight that is missing, left over or of another shape; the first three of each are named.
    """
    target = model.state_dict(keep_vars=True)
    renamed = without_prefix(state, target)
    there = {id(target[k]) for k in renamed if k in target}  # a tied weight has several names and is saved under one
    missing = [k for k in target if k not in renamed and id(target[k]) not in there and not k.endswith(OPTIONAL)]
    unexpected = [k for k in renamed if k not in target]
    shapes = [
        f"{k} {tuple(renamed[k].shape)} instead of {tuple(target[k].shape)}"
        for k in target
        if k in renamed and renamed[k].shape != target[k].shape
    ]
    for k, w in renamed.items():
        if k in target and target[k].is_floating_point() and not w.is_floating_point():
            kind = str(w.dtype).removeprefix("torch.")
            raise InputError(f"{name}: {k} holds codes ({kind}) and not weights; save the dequantized weights")
    if missing or unexpected or shapes:
        raise InputError(f"{name} does not fit the model: {_said(missing, unexpected, shapes)}")
    return renamed


def without_prefix(state: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """The part of `state` that is the model's, under the model's names.

    torch.compile puts `_orig_mod.` into names, DataParallel `module.` before them, Lightning `model.` or whatever the
    attribute is called. The prefix under which most of the wanted names stand is taken off; what stands outside it
    belongs to something else (a metric, a loss). Without a prefix everything belongs to the model. A prefix that names
    an average (`ema_model.`) is not the model's own.

    Raises:
        InputError: the model stands there under several prefixes (a student and a teacher).
    """
    plain = {k.replace("_orig_mod.", ""): v for k, v in state.items()}
    counts = _prefixes(plain, wanted)
    best = next(iter(counts))
    if best and 2 * counts[best] > len(wanted):
        same = [
            p for p in counts if counts[p] == counts[best] and bool(AVERAGED.search(p)) == bool(AVERAGED.search(best))
        ]
        if len(same) > 1:
            names = ", ".join(sorted(same))
            raise InputError(
                f"the checkpoint holds weights of this model {len(same)} times, under {names}: choose one with --key"
            )
        if AVERAGED.search(best):
            raise InputError(f"only averaged weights are there, under {best}: --key {best.rstrip('.')} takes them")
    copies = tuple(_copies(counts, wanted))
    return {k.removeprefix(best): v for k, v in plain.items() if k.startswith(best) and not k.startswith(copies)}


def choice(state: Mapping[str, Tensor], wanted: Collection[str]) -> str | None:
    """Which of several models in a state `without_prefix` takes, in words; None where there is one."""
    counts = _prefixes([k.replace("_orig_mod.", "") for k in state], wanted)
    taken = next(iter(counts))
    if not (copies := _copies(counts, wanted)):
        return None
    names = " and ".join(p.rstrip(".") for p in copies)
    where = f"under {taken.rstrip('.')}" if taken else "without a prefix"
    return f"the weights {where} are taken; the same model is there under {names}, too: see --key"


def _prefixes(names: Collection[str], wanted: Collection[str]) -> dict[str, int]:
    """How many of the wanted names stand under each prefix; the prefix that is taken is the first."""
    prefixes = {""} | {k[: -len(w)] for w in list(wanted)[:1] + list(wanted)[-1:] for k in names if k.endswith("." + w)}
    there = set(names)
    counts = {p: sum(p + w in there for w in wanted) for p in prefixes}
    return dict(sorted(counts.items(), key=lambda x: (-x[1], bool(x[0]), bool(AVERAGED.search(x[0])), len(x[0]), x[0])))


def _copies(counts: Mapping[str, int], wanted: Collection[str]) -> list[str]:
    """The prefixes of further copies of the model; those of its own parts, which may repeat each other, are none."""
    first, *rest = counts
    if 2 * counts[first] <= len(wanted):
        return []
    return [p for p in rest if p and 2 * counts[p] > len(wanted) and not any((first + w).startswith(p) for w in wanted)]


def fitted_or_converted(model: nn.Module, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """As `fitted`; a folder of `save_pretrained` that does not fit is read by transformers."""
    try:
        return fitted(model, state, name)
    except InputError:
        if not (hasattr(model, "from_pretrained") and (Path(name) / "config.json").is_file()):
            raise
        return _renamed_by_transformers(model, state, Path(name))


def _renamed_by_transformers(model: Any, state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights of a folder of `save_pretrained` under the model's names.

    transformers writes some models under names of an older version, and knows them. It gets what was read, and opens
    nothing of the folder: the configuration is the model's.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds an adapter without its base model; combine the two in a function, and pass it as --target"
        )
    loaded, about = type(model).from_pretrained(
        None, config=model.config, state_dict=dict(state), output_loading_info=True, dtype="auto"
    )
    names = [*about["missing_keys"], *about["unexpected_keys"], *about["mismatched_keys"]]
    if names:
        raise InputError(
            f"{folder} does not fit the model: {len(names)} of its weights ({', '.join(map(str, names[:3]))})"
        )
    return loaded.state_dict()


def num_outputs(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The rows of the model's last layer in `state`; None if that layer cannot be identified."""
    renamed = without_prefix(state, model.state_dict())
    layer = _classifier(model)
    weight = renamed.get(f"{layer}.weight") if layer else None
    return None if weight is None else len(weight)


def _classifier(model: nn.Module) -> str | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("classifier")
    if isinstance(name, (tuple, list)):
        name = name[0]
    if name and any(n == name for n, _ in model.named_modules()):
        return str(name)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return linear[-1] if linear else None


def _said(missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    return "; ".join(parts) + "; " + _remedy(missing, unexpected, shapes)


def _remedy(missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    if shapes and not missing and not unexpected:
        return "choose --num-classes, --image-size, --small-stem or --model-kwargs as in training"
    return "choose --model and --model-kwargs as in training, or build the model yourself with --target"
