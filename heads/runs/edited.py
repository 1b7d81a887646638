"""Find cached pairs whose files were edited after ``featurize``."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from ...cache.errors import DataError
from ...cache.store import FeatureCache
from ...featurize.pairs.dataset import Dataset
from ...featurize.pairs.hashing import prefetch
from ...featurize.pairs.pair import Pair

_DAY = 86_400


def edited_notes(cache: FeatureCache, guids: Sequence[str]) -> list[str]:
    """Return a note on how many of ``guids`` were edited since they were featurized; no note if none was.

    Files whose time of change is more than a day before the cache was written are not read: this time cannot be set
    back, so featurize read what they hold now. Nothing is said where the raw pairs are not at hand.
    """
    data = cache.header.dataset["data"]
    try:
        dataset = Dataset.open(data)
    except (DataError, OSError):
        return []
    since, wanted = cache.path.stat().st_mtime - _DAY, set(guids)
    pairs = [pair for pair in dataset.pairs if pair.guid in wanted]
    rows = cache.rows([pair.guid for pair in pairs])
    stored = zip(*(cache.read(f"row/{side}_sha256", rows) for side in ("image", "text")), strict=True)

    def is_edited(task: tuple[Pair, tuple[Any, Any]]) -> bool:
        pair, digests = task
        sides = zip((pair.image, pair.text_path), (pair.read_image, pair.read_text), digests, strict=True)
        try:
            return any(
                hashlib.sha256(read()).digest() != digest.tobytes()
                for path, read, digest in sides
                if path is None or os.stat(path).st_ctime >= since
            )
        except (DataError, OSError, ValueError):  # the file is gone or unreadable, so only the cached row is left
            return False

    edited = sum(prefetch(is_edited, zip(pairs, stored, strict=True), ahead=64))
    if not edited:
        return []
    return [
        f"note: {edited} of {len(guids)} pairs were edited since featurize, and their old content is predicted: run "
        f"`mmcli featurize {data} --out {cache.path}`, or predict with --data {data}"
    ]
