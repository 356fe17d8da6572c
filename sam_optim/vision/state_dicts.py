"""The weights in the content of a file: which entry, which of several models, and whether they are plausible."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sam_optim.core.errors import InputError
from sam_optim.vision.tensor_files import REMEDY, check_plain

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WEIGHTS = ("state_dict", "model", "model_state_dict", "net", "module", "weights")
MANY = 8  # keys that are shown
LARGEST = 1e10  # no weight of a trained network is larger; a damaged one easily is


@dataclass(frozen=True)
class Weights:
    """state: name -> tensor, on the CPU. key: where in the file it was, "" for the file itself. averaged: whether
    these are the averaged ones. not_taken: the keys of other tensors by name that are in the file."""

    state: dict[str, Tensor]
    key: str
    averaged: bool = False
    not_taken: tuple[str, ...] = ()

    @property
    def choice(self) -> str | None:
        """Which weights were taken, in words, where there was a choice."""
        averaged = next((key for key in AVERAGED if key in self.not_taken), None)
        rest = ", ".join(repr(key) for key in self.not_taken[:MANY] if key != averaged)
        words = [f"the weights {f'under {self.key!r}' if self.key else 'of the file'} are taken"]
        words[0] += ", the averaged ones" if self.averaged else ""
        words += [f"--ema takes the averaged ones under {averaged!r}"] if averaged else []
        words += (
            [f"the file has others under {rest}{', ...' if len(self.not_taken) > MANY else ''}: see --key"]
            if rest
            else []
        )
        return "; ".join(words) if self.averaged or self.not_taken else None


def choose(content: Any, path: Path, ema: bool = False, key: str | None = None) -> Weights:
    """The weights in the content of a file. ema, key: as in `checkpoints.read`."""
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds {type(content).__name__}, not weights by name; {REMEDY}")
    keys = [k[:80] if isinstance(k, str) else type(k).__name__ for k in list(content)[:12]]
    has = f"it has {', '.join(keys) or 'nothing'}{', ...' if len(content) > 12 else ''}"
    if key is not None:
        state = _tensors(_entry(content, key)) or _under(content, f"{key}.")
        if state is None:
            raise InputError(f"{path} has no weights under --key {key}; {has}")
        return Weights(state, key, averaged=key in AVERAGED)
    sets = {k: state for k, x in content.items() if isinstance(k, str) and (state := _tensors(x)) is not None}
    averaged = next((k for k in AVERAGED if k in sets), None)
    if ema and averaged is None:
        raise InputError(f"{path} has no averaged weights ({', '.join(AVERAGED)}), {has}; leave --ema out")
    taken = averaged if ema else next((k for k in WEIGHTS if k in sets), None)
    if taken is not None:
        return Weights(sets[taken], taken, ema, tuple(k for k in sets if k != taken))
    if (state := _tensors(content)) is not None:
        return Weights(state, "", not_taken=tuple(sets))
    hint = f"--ema takes those under {averaged}" if averaged else f"--key NAME says where they are, or {REMEDY}"
    raise InputError(f"{path} has no weights under {', '.join(WEIGHTS)}; {has}; {hint}")


def _under(content: Mapping[Any, Any], prefix: str) -> dict[str, Tensor] | None:
    """The weights whose names in a state dict have that prefix, without it."""
    for state in (content, *(content.get(k) for k in WEIGHTS)):
        if isinstance(state, Mapping):
            inside = {str(k).removeprefix(prefix): x for k, x in state.items() if str(k).startswith(prefix)}
            if (tensors := _tensors(inside)) is not None:
                return tensors
    return None


def _entry(content: Any, key: str) -> Any:
    """The entry of that name, or with dots the entry of an entry."""
    if not isinstance(content, Mapping):
        return None
    if key in content:
        return content[key]
    first, _, rest = key.partition(".")
    return _entry(content.get(first), rest) if rest else None


def _tensors(value: Any) -> dict[str, Tensor] | None:
    """The tensors of a mapping of names to tensors and to a few plain values (counters); None of anything else."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return None
    state = {name: x for name, x in value.items() if isinstance(x, Tensor)}
    return state if state and len(state) >= len(value) / 2 else None


def check_values(checkpoint: str, name: str, w: Tensor) -> None:
    """Raises InputError for a weight that is no plain tensor, or has values that no training gives."""
    check_plain(f"{checkpoint}: {name}", w)
    if not w.is_floating_point() or not w.numel():
        return
    largest = float(w.abs().max())
    if not math.isfinite(largest):
        raise InputError(f"{checkpoint}: {name} has values that are not finite; nothing can be measured")
    if largest > LARGEST:
        raise InputError(
            f"{checkpoint}: {name} has values of up to {largest:.1e}, far beyond trained weights; the file is damaged"
        )
