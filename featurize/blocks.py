"""The blocks of a plan: encoded one after the other, each written as a part."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..cache.parts import parts_folder, write_part
from ..cache.store import FeatureCache
from .backbones.opening import choose_device
from .cached_rows import FileRows
from .encode import EncodedBlocks, OnProgress, encode_blocks
from .index import EmbeddingIndex
from .pairs.hashing import Reject
from .plan import Plan
from .rejects import refuse_too_many
from .request import Request


@dataclass(frozen=True)
class ComputedRows:
    """Rows that this run computed, one entry per part, and the pairs that it rejected."""

    parts: list[FileRows]
    rejects: list[Reject]

    def __len__(self) -> int:
        return sum(map(len, self.parts))


@contextlib.contextmanager
def open_index(request: Request, plan: Plan) -> Iterator[EmbeddingIndex]:
    """Give an index of all embeddings that are on disk; it is empty if nothing must be computed."""
    with EmbeddingIndex(request.encode.clean) as index:
        for path in [request.out, *plan.parts] if plan.blocks else ():
            if path.exists():
                with FeatureCache.open(path) as cache:
                    # Files without views are welcome: views belong to a pair, so they are computed anyway.
                    is_usable = cache.has_cleaned and (cache.has_tokens or not request.encode.tokens)
                if is_usable:
                    index.add(path, plan.cached.reusable if path == request.out else None)
        yield index


def encode_plan(request: Request, plan: Plan, index: EmbeddingIndex, on_progress: OnProgress | None) -> EncodedBlocks:
    """Load the backbone and encode the blocks of the plan, in order. Nothing is loaded if nothing must be computed."""
    if not plan.blocks:
        return
    options, pairs, total = request.options, request.dataset.pairs, sum(map(len, plan.blocks))
    encoder = request.backbone.load(choose_device(options.device), request.header.identity["dtype"], options.resize)
    if on_progress is not None:
        on_progress(0, total)
    blocks = ([pairs[number] for number in numbers.tolist()] for numbers in plan.blocks)
    yield from encode_blocks(blocks, encoder, request.encode, on_progress, index, total)


def write_parts(request: Request, plan: Plan, blocks: EncodedBlocks, index: EmbeddingIndex) -> ComputedRows:
    """Write each block as a part and add it to the index.

    Raises
    ------
    DataError
        More pairs are rejected than allowed; checked before the first block, and after each.
    """
    pairs = request.dataset.pairs
    folder = parts_folder(request.out, request.header.fingerprint)
    first = 1 + max((int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.h5")), default=-1)
    parts: list[FileRows] = []
    rejects = [*plan.rejects]
    refuse_too_many(request, plan, rejects)
    with contextlib.closing(blocks):
        for numbers, (block, rejects_of_block) in zip(plan.blocks, blocks, strict=True):
            rejects += rejects_of_block
            if block.guids:
                path = write_part(folder, first + len(parts), block, request.header)
                index.add(path)
                number_of = {pairs[number].guid: number for number in numbers.tolist()}
                numbers_of_rows = np.array([number_of[guid] for guid in block.guids], dtype=np.int64)
                parts.append(FileRows(path, numbers_of_rows, np.arange(len(block.guids))))
            refuse_too_many(request, plan, rejects)
    return ComputedRows(parts, rejects)
