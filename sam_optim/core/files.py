"""Files that are whole or absent, a lock against a second writer, and strict JSON."""

from __future__ import annotations

import json
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from sam_optim.core.errors import InputError, one_line

LARGEST = 1 << 30  # bytes of a file that is read as a whole
PATIENCE = 120.0  # seconds to wait for a lock that is held while something is written
UNNAMED = 1.0  # seconds that a holder has to say who it is


def is_stream(path: Path) -> bool:
    """Whether a path is a device or a pipe (/dev/stdout), which cannot be replaced or read back."""
    if path.is_relative_to("/dev/shm"):
        return False
    if path.is_relative_to("/dev") or path.is_relative_to("/proc"):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def check_writable(path: Path | None, option: str = "--out") -> None:
    """Raises InputError for what cannot become a file, before hours go into what it is to hold."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{path} is a directory; name a file for {option}")
    if is_stream(path):
        is_there, is_device = path.exists(), path.is_relative_to("/dev") or path.is_relative_to("/proc")
        if not is_there or not (is_device or path.is_char_device()):  # a named pipe waits for a reader, perhaps forever
            reason = "is a named pipe, a socket or a disk" if is_there else "is not there"
            raise InputError(
                f"{path} {reason}; name a file for {option}, or /dev/stdout with a pipe behind the command"
            )
        return
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "cannot be written to" if folder.is_dir() else "is not a directory"
        raise InputError(f"{path} cannot be written: {folder} {reason}; choose another {option}")


def _open_stream(path: Path) -> IO[bytes]:
    """Opens for writing. Standard output redirected to a file is not opened again: that would write from its start."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # none, or one that is no file
            if os.path.samestat(os.stat(path), os.fstat(stream.fileno())):
                stream.flush()
                return open(os.dup(stream.fileno()), "wb")
    return open(path, "ab")


def fsync_directory(directory: Path) -> None:
    """Makes a rename inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes, option: str = "--out", *, folder: bool = True) -> None:
    """The old file or the new one, never a part of it: temporary file, fsync, rename, fsync of the directory.

    A file that is there keeps its mode. A device or pipe is written to. folder: it is made if it is not there.
    """
    temporary = path.with_name(
        f".{path.name}.{secrets.token_hex(8)}.tmp"
    )  # a name that no one can have linked beforehand
    try:
        if is_stream(path):
            check_writable(path, option)
            with _open_stream(path) as stream:
                stream.write(content)
            return
        if folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(handle, "wb") as file:
            if path.exists():
                os.fchmod(handle, stat.S_IMODE(path.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        message = f"cannot write {len(content):,} bytes to {path} ({reason}); free some space or choose another"
        raise InputError(f"{message} {option}") from None
    fsync_directory(path.parent)


@contextmanager
def locked(path: Path, option: str = "--out", patience: float = 0.0) -> Iterator[None]:
    """Holds the only right to write `path`; the kernel releases it when the process ends, in whatever way.

    Raises:
        InputError: another process has it for more than `patience` seconds; the message says which one.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    absent = [folder for folder in path.parents if not folder.exists()]
    deadline = time.monotonic() + patience
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 100).decode(errors="replace")
            os.close(handle)
            if time.monotonic() < deadline + (0.0 if holder else UNNAMED):
                time.sleep(0.02)
                continue
            holder = holder or "another process"
            raise InputError(f"{path} is being written by {holder}; wait for it, or choose another {option}") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.lstat(lock)):
                break
        os.close(handle)  # its holder removed the file between opening and locking: once more
    _held.add(handle)
    try:
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()}".encode())
        yield
    finally:
        if handle in _held:
            _held.remove(handle)
            lock.unlink(missing_ok=True)
            os.close(handle)
            with suppress(OSError):  # nothing was written: no folder stays for the lock alone
                for folder in absent:
                    folder.rmdir()


@contextmanager
def reserved(path: Path | None, option: str = "--out") -> Iterator[None]:
    """For one file that takes hours: `check_writable`, and `locked` from then on until it is written."""
    check_writable(path, option)
    with nullcontext() if path is None or is_stream(path) else locked(path, option):
        yield


_held: set[int] = set()  # descriptors of locks


def _let_go() -> None:
    """Releases the locks in a forked process (a data loader's worker), which may outlive this one."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)


def write_json(path: Path, value: Any, option: str = "--out") -> None:
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    write_atomic(path, (text + "\n").encode(), option)


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file for reading; a pipe or device, which could block forever, is an `InputError`."""
    return open(_regular(path, os.O_RDONLY), "rb")


def open_log(path: Path) -> IO[str]:
    """Opens a file to append text to it, as `open_regular`."""
    return open(_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8")


def _regular(path: Path, flags: int) -> int:
    handle = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"{path} is not a regular file")
    return handle


def read_bytes(path: Path, limit: int = LARGEST) -> bytes:
    """The content of a file of at most `limit` bytes."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{path} has more than {limit:,} bytes")
    return content


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path).decode(), parse_constant=_not_json, object_pairs_hook=_unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError, too many digits, deep brackets
        raise InputError(f"{path} is not valid JSON ({one_line(error)}); it was changed or damaged") from None


def read_json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object; it was changed or damaged")
    return content


@contextmanager
def intact(path: Path | str) -> Iterator[None]:
    """Makes an `InputError` that names the file of what its content does to the code inside, which takes it as ours."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path} is not as it was written, it was changed or damaged ({reason}); delete it") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("it has a name twice in one object")
    return values


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON allows")
