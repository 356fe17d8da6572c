"""What the demo runs: five methods from the same initializations, each tuned with the same budget, on noisy digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import sam_optim
from sam_optim._version import __version__
from sam_optim.core.geometry import Ball

NOISY, CLEAN, TEST = "noisy training labels", "clean training labels", "test data"
DATA = (NOISY, CLEAN, TEST)


@dataclass(frozen=True)
class Method:
    """One way to train. `tuned` is the setting that the plan has a grid for; None where nothing is tuned."""

    name: str
    optimizer: str  # SGD, SAM or ASAM
    tuned: str | None = None
    epochs_factor: int = 1


METHODS: dict[str, Method] = {
    "sgd": Method("SGD", "SGD"),
    "sgd_long": Method("SGD, twice the epochs", "SGD", epochs_factor=2),
    "sgd_decay": Method("SGD, tuned weight decay", "SGD", "weight_decay"),
    "sam": Method("SAM", "SAM", "rho"),
    "asam": Method("ASAM", "ASAM", "rho"),
}
STYLE = {method: i for i, method in enumerate(METHODS)}

MEASURES = {
    "loss": "loss",
    "sam_ball": "sharpness in SAM's ball",
    "asam_ball": "sharpness in ASAM's ball",
    "lambda_max": "largest Hessian eigenvalue",
    "trace": "Hessian trace",
    "regret": "gradient regret",
}


@dataclass(frozen=True)
class Plan:
    """Every setting of the demo. The grids have one length: the tuned methods get the same budget."""

    epochs: int = 30
    lr: float = 0.05
    momentum: float = 0.9
    batch_size: int = 64
    label_noise: float = 0.4
    validation_fraction: float = 0.2
    num_seeds: int = 5
    num_tuning_seeds: int = 3
    grids: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "sgd_decay": (0.002, 0.005, 0.01, 0.02, 0.03),
            "sam": (0.05, 0.1, 0.15, 0.2, 0.3),
            "asam": (1.0, 2.0, 3.0, 4.0, 6.0),
        }
    )
    num_measured: int = 256  # examples of each data set that sharpness is measured on
    num_steps: int = 20
    num_probes: int = 30
    points_1d: int = 41
    points_2d: int = 21

    @property
    def seeds(self) -> range:
        return range(self.num_seeds)

    @property
    def tuning_seeds(self) -> range:
        """Seeds (of labels, initialization and order) that no reported run uses."""
        return range(1000, 1000 + self.num_tuning_seeds)


QUICK = Plan(
    epochs=2,
    num_seeds=2,
    num_tuning_seeds=1,
    grids={"sgd_decay": (0.001, 0.01), "sam": (0.05, 0.1), "asam": (0.5, 1.0)},
    num_measured=128,
    num_steps=2,
    num_probes=2,
    points_1d=5,
    points_2d=5,
)


def tuning_jobs(plan: Plan) -> dict[str, dict[str, Any]]:
    """name -> settings of every run whose validation accuracy chooses a setting."""
    return {
        f"tune-{method}-{value:g}-seed{seed}": recipe(plan, method, value, seed) | {"kind": "tuning"}
        for method, grid in plan.grids.items()
        for value in grid
        for seed in plan.tuning_seeds
    }


def final_jobs(plan: Plan, chosen: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """name -> settings of every reported run; `chosen` are the tuned settings."""
    names = ("num_measured", "num_steps", "num_probes", "points_1d", "points_2d")
    measuring: dict[str, Any] = {name: getattr(plan, name) for name in names}
    measuring["balls"] = {name: ball.to_dict() for name, ball in balls(chosen).items()}
    return {
        f"{method}-seed{seed}": recipe(plan, method, chosen.get(method), seed)
        | {"kind": "final", "plane": seed == plan.seeds[0], "measuring": measuring}
        for seed in plan.seeds
        for method in METHODS
    }


def recipe(plan: Plan, method: str, value: float | None, seed: int) -> dict[str, Any]:
    names = ("lr", "momentum", "batch_size", "label_noise", "validation_fraction")
    settings: dict[str, Any] = {name: getattr(plan, name) for name in names}
    settings |= {"method": method, "seed": seed, "epochs": plan.epochs * METHODS[method].epochs_factor}
    settings |= {"weight_decay": 0.0, "rho": None}
    tuned = METHODS[method].tuned
    return settings | ({tuned: value} if tuned else {})


def balls(chosen: Mapping[str, float]) -> dict[str, Ball]:
    """The neighborhoods that SAM and ASAM minimize over, by the name of their measure."""
    return {"sam_ball": Ball(chosen["sam"]), "asam_ball": Ball(chosen["asam"], adaptive=True)}


def shorter(plan: Plan, *, epochs: int | None, num_seeds: int | None) -> Plan:
    changes = {"epochs": epochs, "num_seeds": num_seeds}
    return replace(plan, **{name: value for name, value in changes.items() if value is not None})


def fingerprint(job: Mapping[str, Any]) -> str:
    """Changes with every setting, version and line of code that trains or measures: only equal runs are reused."""
    about = {"job": job, "torch": torch.__version__, "sam_optim": __version__, "code": _code()}
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=6).hexdigest()


@cache
def _code() -> str:
    package, here = Path(sam_optim.__file__).parent, Path(__file__).resolve().parents[1]
    files = [p for p in sorted(package.rglob("*.py")) if "report" not in p.parts]
    files += [here / "train" / f"{name}.py" for name in ("data", "batches", "order", "epoch")]
    files += [here / "demo" / "runs.py"]
    return hashlib.blake2b(b"".join(p.read_bytes() for p in files), digest_size=6).hexdigest()
