"""Files of tensors, read without running anything that is in them, and checked where they can be."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sam_optim.core.errors import InputError, one_line
from sam_optim.core.files import open_regular, read_bytes

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")
NAMED_BY_CONTENT = re.compile(r"checkpoint-(\d{9})-([0-9a-f]{16})\.pt")  # benchmarks.train: step, SHA-256
REMEDY = "save the weights alone, torch.save(model.state_dict(), path), or as .safetensors"
SAFE_TORCH = (2, 10)  # before it, a crafted pickle gets past weights_only=True
TRUST = "SAM_OPTIM_TRUST_PICKLES"
LARGE = 1 << 30  # bytes: claimed sizes up to this one are not checked
OTHER_FORMATS = {  # how a file begins -> what it is, and what to do
    b"GGUF": "a GGUF file of llama.cpp, whose weights are quantized; give the checkpoint that it was made from",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras), not one of PyTorch",
    b"version https://git-lfs": "a Git LFS pointer and not the file itself: run `git lfs pull`",
    b"<!doctype html": "a web page and not the file itself: download it again",
    b"<html": "a web page and not the file itself: download it again",
    b"\x93NUMPY": "an array of NumPy, without the names of the weights",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
}


def read_file(path: Path, sha256: Any = None) -> Any:
    """What a file holds, if it holds nothing but tensors and plain values.

    Args:
        sha256: a hash object of hashlib, which is fed with the content that is read.

    Raises:
        InputError: of another format, damaged, or it needs more than tensors and plain values. The zip format of
            torch.save has checksums, safetensors and the older format of torch.save have none: FILE.sha256 beside one
            is checked.
    """
    with open_regular(path) as file:
        said, where = _said(path)
        content = hashlib.sha256()
        for block in _blocks(file) if said or sha256 else ():
            content.update(block)
            if sha256:
                sha256.update(block)
        if said and not content.hexdigest().startswith(said):
            actual = content.hexdigest()[:16]
            raise InputError(f"{path} is damaged: its SHA-256 begins with {actual}, {where} says {said[:16]}")
        file.seek(0)
        _check_format(path, file)
        return _read_safetensors(path, file) if path.suffix == ".safetensors" else _read_torch(path, file)


def _said(path: Path) -> tuple[str, str]:
    """The SHA-256 of a file, or how it begins, and what says so: its name, or FILE.sha256 as `sha256sum` writes it."""
    if named := NAMED_BY_CONTENT.fullmatch(path.name):
        return named[2], "its name"
    beside = path.with_name(f"{path.name}.sha256")
    if not beside.is_file():
        return "", ""
    said = re.match(rb"\\?([0-9a-f]{64})\b", read_bytes(beside, 1 << 16))
    if said is None:
        raise InputError(f"{beside} has no SHA-256 as `sha256sum` writes it; remove it, or write it again")
    return said[1].decode(), beside.name


def digest(*paths: Path) -> str:
    """SHA-256 of the content, the first 16 hexadecimal digits."""
    content = hashlib.sha256()
    for path in paths:
        with open_regular(path) as file:
            for block in _blocks(file):
                content.update(block)
    return content.hexdigest()[:16]


def check_pickles(name: str) -> None:
    """Raises InputError where the torch that is installed can be made to run what is in a pickle."""
    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if installed < SAFE_TORCH and os.environ.get(TRUST) != "1":
        raise InputError(
            f"{name} is a pickle, and torch {torch.__version__} can be made to run what is in one: install torch 2.10 "
            f"or newer, or give .safetensors; {TRUST}=1 in the environment reads those that you wrote yourself"
        )


def check_plain(name: str, x: Tensor) -> None:
    """Raises InputError for a tensor that holds no plain numbers in memory."""
    if x.device.type == "meta":
        raise InputError(f"{name} is a tensor on the device meta, which has no numbers; save the weights themselves")
    if x.is_nested:
        raise InputError(f"{name} is a nested tensor, of several shapes; save its parts")
    if x.layout != torch.strided:
        raise InputError(f"{name} is a sparse tensor; save it with .to_dense()")
    if x.is_quantized:
        raise InputError(f"{name} is quantized; save it with .dequantize()")
    if x.is_complex():
        raise InputError(f"{name} is complex; measures need real weights")
    if x.is_floating_point() and x.element_size() == 1:
        raise InputError(
            f"{name} has the type {str(x.dtype).removeprefix('torch.')}: its scales are elsewhere; save it as float32"
        )
    if x.numel() * x.element_size() > max(LARGE, x.untyped_storage().nbytes()):
        raise InputError(f"{name} claims the shape {tuple(x.shape)}, with numbers for a small part of it in the file")


def check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises InputError for an archive that unpacks to much more than it is itself."""
    total = sum(member.file_size for member in archive.infolist())
    if total > max(LARGE // 4, 20 * path.stat().st_size):
        raise InputError(f"{path} claims to unpack to {total:,} bytes, which no file of numbers does")


def _read_torch(path: Path, file: IO[bytes]) -> Any:
    check_pickles(str(path))
    try:
        if file.read(4) == b"PK\x03\x04":
            _check_zip(path, file)
        else:
            file.seek(0)
            for _ in range(5):  # the older format: a number, a version, about the machine, the object, its storages
                _check_pickle(path, file)
        file.seek(0)
        # timm's scripts save their options as a Namespace, which is plain attributes, and metrics as NumPy's numbers
        with torch.serialization.safe_globals([argparse.Namespace, *NUMBERS]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle's protocol, sparse tensors; what does not load is an error
            content = torch.load(file, map_location="cpu", weights_only=True)
        _check_objects(path, content)
        return content
    except pickle.UnpicklingError as error:
        if needs := re.search(r"GLOBAL (\S+)", str(error)):
            refused = f"it refers to {needs[1]}, and nothing in it was run"
            raise InputError(f"{path} holds more than weights: {refused}; {REMEDY}") from None
        reason = re.search(r"WeightsUnpickler error: (.+)", str(error))
        raise InputError(f"{path} is damaged or no checkpoint of torch: {reason[1] if reason else 'pickle'}") from None
    except InputError:
        raise
    except Exception as error:  # whatever a crafted pickle makes of torch's own functions
        raise InputError(f"{path} is {_damage(path, error)}; copy it again, or leave it out") from None


def _check_zip(path: Path, file: IO[bytes]) -> None:
    """torch.load does not look at the checksums."""
    with zipfile.ZipFile(file) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            raise InputError(f"{path} is TorchScript; save the state_dict() of torch.jit.load(path)")
        if names & {"archive_format", "serialized_exported_program.json"}:
            raise InputError(f"{path} is an exported program (.pt2); save the state_dict of torch.export.load(path)")
        if "data.pkl" not in names:
            raise InputError(f"{path} is an archive (.zip), but not of torch.save; unpack it first")
        check_sizes(path, archive)
        if (bad := archive.testzip()) is not None:
            raise InputError(f"{path} is damaged: {bad} does not have the checksum that the file records")
        for name in archive.namelist():
            if name.rpartition("/")[2] == "data.pkl":
                _check_pickle(path, archive.read(name))


def _check_objects(path: Path, content: Any) -> None:
    """Refuses what a pickle can do to objects that torch makes: attributes in the place of their methods, and memory
    that the file does not fill (torch.Tensor(10**9))."""
    most = max(LARGE // 4, 20 * path.stat().st_size)  # as of an archive
    objects, visited = [content], set()
    for x in objects:
        if id(x) in visited:
            continue
        visited.add(id(x))
        attributes = map(str, getattr(x, "__dict__", ()) if isinstance(x, (dict, Tensor)) else ())
        if wrong := next((name for name in attributes if hasattr(type(x), name)), None):
            raise InputError(f"{path} holds more than weights: an attribute {wrong[:40]!r}; {REMEDY}")
        if isinstance(x, (dict, list, tuple, set)):
            objects += x.values() if isinstance(x, dict) else x
        is_plain = isinstance(x, Tensor) and x.layout == torch.strided and not (x.is_nested or x.is_meta)
        if is_plain and (size := x.untyped_storage().nbytes()) > most:
            raise InputError(f"{path} asks for {size:,} bytes for a tensor, far more than it has; {REMEDY}")


def _check_pickle(path: Path, content: bytes | IO[bytes]) -> None:
    """Refuses what torch's reader would run for hours or until memory is full: it lets a pickle call encoders (how
    Python 2 gets bytes) and bytearray."""
    longest, calls, encodes = 0, 0, False
    for opcode, argument, _ in pickletools.genops(content):
        calls += opcode.name == "REDUCE"
        if opcode.name == "GLOBAL":
            encodes |= argument == "_codecs encode"
            slow = str(argument).endswith(" bytearray")
        elif isinstance(argument, (str, bytes)):
            longest = max(longest, len(argument))
            slow = str(argument).lower().strip("-_ ") in ("punycode", "idna")
        else:
            continue
        if slow:
            raise InputError(f"{path} holds more than weights: {str(argument)[:40]}; {REMEDY}")
    if encodes and longest * calls > LARGE:
        raise InputError(f"{path} asks for more bytes than {LARGE:,} by encoding its text again and again; {REMEDY}")


def _read_safetensors(path: Path, file: IO[bytes]) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError:
        raise InputError(f"{path} needs safetensors: pip install 'sam_optim[bench]'") from None
    try:
        return load(file.read())
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {one_line(error)[:200]}") from None


def _check_format(path: Path, file: IO[bytes]) -> None:
    """Names a file of another format for what it is."""
    start = file.read(64)
    file.seek(0)
    for magic, meaning in OTHER_FORMATS.items():
        if start.lstrip().lower().startswith(magic.lower()) or start.startswith(magic):
            raise InputError(f"{path} is {meaning}")
    if path.suffix == ".onnx" or (start[:1] == b"\x08" and any(word in start for word in (b"onnx", b"pytorch"))):
        raise InputError(f"{path} is an ONNX file; give the checkpoint that it was exported from")


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(1 << 20):
        yield block


class _Dtype:
    """Stands for numpy.dtype in a pickle: what rebuilds the real one can be given flags that crash the process."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def _scalar(dtype: Any, content: Any) -> int | float | bool:
    """Stands for the function that makes a pickled number of NumPy."""
    import numpy as np

    if not isinstance(dtype, _Dtype) or not re.fullmatch("[biuf][1248]", str(dtype.code)) or dtype.order not in "<>|=":
        raise ValueError("it has a number of NumPy of an unknown type")
    return np.frombuffer(content, np.dtype(dtype.order + dtype.code))[0].item()


NUMBERS: list[Any] = [
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch cannot open; the text of a KeyError or EOFError is a byte of it."""
    if path.stat().st_size == 0:
        return "empty"
    reason = "" if isinstance(error, (KeyError, EOFError)) else one_line(error).split(". ")[0][:200]
    return f"damaged or no checkpoint of torch{reason and ': '}{reason}"
