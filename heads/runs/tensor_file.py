"""Files of tensors: written by ``torch.save``, and read only if the checksum of every record is right.

PyTorch's own reader ignores the checksums of the zip file, and would use a flipped bit.
"""

import io
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...cache.atomic import write_bytes


class TensorFileError(ValueError):
    """A file of tensors cannot be used; the message says why, without the name of the file."""


class CodeInsideError(TensorFileError):
    """The file holds Python objects, which could run code."""


def write_tensor_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data and tensors to ``path``, atomically."""
    buffer = io.BytesIO()  # torch.save to a full disk raises a RuntimeError that does not say so
    torch.save(dict(content), buffer)
    write_bytes(path, buffer.getbuffer())


def read_tensor_file(path: Path) -> Any:
    """Return what ``torch.save`` wrote to ``path``, without running code or taking more memory than the file's size.

    Raise a TensorFileError if the file holds no tensors, or is cut off or damaged.
    """
    if not zipfile.is_zipfile(path):  # a bare pickle is never opened
        raise TensorFileError("it is no file of tensors, or is cut off")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise TensorFileError("it is compressed, which torch.save never does")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise TensorFileError("its records are larger than the file")
            damaged = archive.testzip()
        if damaged is not None:
            raise TensorFileError(f"it is damaged: the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CodeInsideError("it holds Python objects, which could run code when loaded") from error
    except TensorFileError:
        raise
    except (
        zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError, KeyError,
        TypeError, AttributeError, IndexError, OverflowError,
    ) as error:  # fmt: skip
        raise TensorFileError(f"it cannot be read, it may be cut off ({first_line(error)})") from error


def check_tensors(tensors: Any, expected: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError unless ``tensors`` has the names, shapes and types of ``expected``, and finite numbers."""
    if not isinstance(tensors, Mapping):
        raise ValueError("its tensors have no names")
    different = sorted(map(str, tensors.keys() ^ expected.keys()))
    if different:
        raise ValueError(f"{different[0]} is {'unknown' if different[0] in tensors else 'missing'}")
    for name, like in expected.items():
        tensor = tensors[name]
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{name} is no tensor")
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ValueError(f"{name} is {_described(tensor)}, not {_described(like)}")
        check_tensor(name, tensor)


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError where a tensor has more numbers than its storage, or a number is not finite."""
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} repeats its numbers")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite")


def _described(tensor: torch.Tensor) -> str:
    return f"{' x '.join(map(str, tensor.shape)) or 'a number'} {str(tensor.dtype).removeprefix('torch.')}"


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]
