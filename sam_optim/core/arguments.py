"""Types of command-line arguments for argparse, whose errors are an `InputError` of one line."""

from __future__ import annotations

import argparse
import ast
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from sam_optim.core.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `InputError` instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        if empty := next((w for w in words if w.startswith("--") and w.endswith("=--")), None):
            self.error(f"{empty} has no value")  # argparse would make an empty list of it
        return super().parse_known_args(words, namespace)


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """Converts to a finite number in [low, high], or in (low, high] with `above`."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {kind.__name__}, got {text!r}") from None
        if not math.isfinite(value) or value < low or value > high or (above and value == low):
            bound = f"{'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    return convert


def numbers(text: str) -> list[float]:
    """Numbers > 0, separated by commas, each once."""
    return list(dict.fromkeys(number(float, 0, above=True)(part) for part in text.split(",")))


def numbers_of_any_sign(text: str) -> list[float]:
    return [number(float)(part) for part in text.split(",")]


def pair(text: str) -> tuple[str, Any]:
    """KEY=VALUE, where VALUE is a Python literal or a bare word."""
    key, separator, value = text.partition("=")
    if not separator or not key.replace(".", "_").isidentifier():
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: deep brackets
        return key, value
