"""Exporting a cache to files for other tools."""

from pathlib import Path

import numpy as np

from .atomic import atomic_path, refuse_to_overwrite, write_text
from .errors import MmcliError
from .hdf5 import slices
from .store import FeatureCache

_BLOCK_ROWS = 4096


def export_npy(cache: FeatureCache, folder: str | Path) -> list[Path]:
    """Write ``image.npy``, ``text.npy`` and, if there are views, ``image_views.npy``. Return the paths.

    ``guids.txt`` lists the guids of the rows. Shapes and dtypes are those of the cache. Memory does not grow with the
    number of rows.
    """
    folder = Path(folder)
    written = []
    for name in ("image", "text", "image_views"):
        if name not in cache.file:
            continue
        source = cache.file[name]
        path = folder / f"{name}.npy"
        header = {"descr": np.lib.format.dtype_to_descr(source.dtype), "fortran_order": False, "shape": source.shape}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for span in slices(len(cache), _BLOCK_ROWS):
                file.write(cache.read(name, np.arange(span.start, span.stop)).tobytes())
        written.append(path)
    write_text(folder / "guids.txt", "".join(f"{guid}\n" for guid in cache.guids))
    return [*written, folder / "guids.txt"]


def export_parquet(cache: FeatureCache, path: str | Path) -> list[Path]:
    """Write one Parquet file with the columns ``guid``, ``image`` and ``text`` (fixed-size lists of float32).

    A MmcliError says that pyarrow is not installed, or that ``path`` must not be overwritten.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MmcliError("Parquet needs another package: pip install pyarrow") from error
    path = Path(path)
    refuse_to_overwrite(path, b"PAR1", [cache.path])
    embedding = pa.list_(pa.float32(), cache.dim)
    schema = pa.schema([("guid", pa.string()), ("image", embedding), ("text", embedding)])
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for span in slices(len(cache), _BLOCK_ROWS):
            columns = [pa.array(cache.guids[span])]
            for name in ("image", "text"):
                values = cache.read(name, np.arange(span.start, span.stop)).astype(np.float32)
                columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), cache.dim))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    return [path]
