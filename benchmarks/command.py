"""What the commands share: options declared as the fields of a dataclass, signals, logs of JSON lines."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import threading
import tomllib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sam_optim.core.arguments import Parser as StrictParser
from sam_optim.core.errors import InputError
from sam_optim.core.files import read_bytes

Settings = TypeVar("Settings")
LONGEST = 1 << 18  # bytes of a file of settings
SWITCH = argparse.BooleanOptionalAction  # --fsdp, and --no-fsdp against a --config that has it


class Parser(StrictParser):
    """Suggests the options that a mistyped one may mean."""

    def error(self, message: str) -> NoReturn:
        super().error(f"{message}{self._nearest(message)}")

    def _nearest(self, message: str) -> str:
        head, _, rest = message.partition(": ")
        if head != "unrecognized arguments":
            return ""
        names = [o[2:] for action in self._actions for o in action.option_strings if o.startswith("--")]
        hints = []
        for word in (w.partition("=")[0] for w in rest.split() if w.startswith("--")):
            if near := get_close_matches(word[2:].replace("_", "-"), names, n=3):
                hints.append(f"; {word}: did you mean {' or '.join('--' + name for name in near)}?")
        return "".join(hints)


def option(default: Any = dataclasses.MISSING, help: str | None = None, **about: Any) -> Any:
    """A field of a dataclass of settings, with the arguments of `add_argument`. Without a default it is required."""
    metadata = {"option": about | {"help": help}}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """`--some-name` for each field `some_name` that is an `option`, or its `flags`; without a dash it is positional."""
    for field in dataclasses.fields(settings):
        if "option" not in field.metadata:
            continue
        about = dict(field.metadata["option"])
        flags = about.pop("flags", ["--" + field.name.replace("_", "-")])
        if flags[0].startswith("-"):
            about["dest"] = field.name
        if field.default is not dataclasses.MISSING:
            about["default"] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            about["default"] = field.default_factory()
        elif flags[0].startswith("-"):
            about["required"] = True
        if "type" in about:
            about["type"] = _explained(about["type"])
        parser.add_argument(*flags, **about)


def _explained(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """argparse shows the message of an ArgumentTypeError alone."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


def settings_of(settings: type[Settings], prog: str, description: str | None, argv: Sequence[str] | None) -> Settings:
    """The command line as a `settings`."""
    parser = Parser(prog=prog, description=(description or "").strip().splitlines()[0])
    add_options(parser, settings)
    return settings(**vars(parser.parse_args(argv)))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that was cut off when the process was killed is left out."""
    records: list[dict[str, Any]] = []
    lines = read_bytes(path).splitlines() if path.exists() else []
    for i, line in enumerate(lines):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            if i < len(lines) - 1:
                raise InputError(
                    f"{path}, line {i + 1} is not valid JSON of one object; it was changed or damaged"
                ) from None
    return records


def read_settings(path: Path, *, yaml: bool) -> dict[str, Any]:
    """The tables of a YAML or TOML file, by name. YAML's aliases are refused: a few lines can expand to gigabytes.

    Raises:
        InputError: the file cannot be read, is of another format, or holds no tables.
    """
    try:
        text = read_bytes(path, LONGEST).decode()
        content = _from_yaml(text) if yaml else tomllib.loads(text)
        json.dumps(content)  # what is no plain value, such as a date, or a number of thousands of digits
    except Exception as error:  # whatever a parser makes of a damaged file: YAMLError, RecursionError, AttributeError
        reason = "it is not a file" if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read: {reason or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must be a mapping of names to values, like `lr: 0.1`, got {type(content).__name__}")
    return content


def _from_yaml(text: str) -> Any:
    import yaml

    if text.count("[") + text.count("{") > 1000:  # the time of the parser grows with the square of their depth
        raise InputError("it has more than 1000 brackets, which no settings need")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise InputError("it has an alias (*NAME): write out what that stands for")
    nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    for node in nodes:
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise InputError("it has a list or a mapping as a name; names are text")
                key.tag = "tag:yaml.org,2002:str"  # also of names that look like numbers, dates or truth values
                if key.value in names:
                    raise InputError(f"it has {key.value!r} twice; leave one out")
                names.add(key.value)
                nodes.append(value)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and ":" in node.value:
            raise InputError(f"{node.value} is a number to the base 60 in YAML; write it as a decimal number")
    return yaml.SafeLoader("").construct_document(nodes[0]) if nodes[0] else None


class Interrupted(Exception):
    """A signal asked the command to stop."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum, self.name = signum, signal.Signals(signum).name


class Signals:
    """While active, the first Ctrl-C or SIGTERM is only noted, and `check` raises it where stopping is safe.

    A second one acts at once, as if this had never been.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: object) -> None:
        self.received = signum
        self.__exit__()

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
