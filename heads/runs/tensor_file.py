"""Files of tensors: written by ``torch.save``, read only where every byte is as it was written.

PyTorch's reader does not look at the checksums of the zip file that it reads, and would use a flipped bit.
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
    """A file of tensors cannot be used; says what is wrong with it, without its name."""


class CodeInsideError(TensorFileError):
    """It holds Python objects, which could run code."""


def write_tensor_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data and tensors to ``path``, whole or not at all."""
    buffer = io.BytesIO()  # torch's own writing says RuntimeError where the disk is full
    torch.save(dict(content), buffer)
    write_bytes(path, buffer.getbuffer())


def read_tensor_file(path: Path) -> Any:
    """Return what ``torch.save`` wrote to ``path``. No code in it is run.

    Raises
    ------
    TensorFileError
        Not such a file, cut off, or damaged. Memory is not taken beyond the size of the file.
    """
    if not zipfile.is_zipfile(path):  # a bare pickle is not even opened
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
            raise TensorFileError(f"it is damaged: the checksum of {damaged} is another")
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


def check_tensors(given: Any, expected: Mapping[str, torch.Tensor]) -> None:
    """Check that ``given`` has the names, shapes and types of ``expected``, and finite numbers only.

    Raises
    ------
    ValueError
        Naming the tensor that does not fit.
    """
    if not isinstance(given, Mapping):
        raise ValueError("its tensors have no names")
    different = sorted(map(str, given.keys() ^ expected.keys()))
    if different:
        raise ValueError(f"{different[0]} is {'unknown' if different[0] in given else 'missing'}")
    for name, like in expected.items():
        tensor = given[name]
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{name} is no tensor")
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ValueError(f"{name} is {_described(tensor)}, not {_described(like)}")
        check_tensor(name, tensor)


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError where a tensor claims more numbers than it brings, or one is not finite."""
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} repeats its numbers")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite")


def _described(tensor: torch.Tensor) -> str:
    return f"{' x '.join(map(str, tensor.shape)) or 'a number'} {str(tensor.dtype).removeprefix('torch.')}"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
