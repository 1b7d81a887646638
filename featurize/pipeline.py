"""``featurize``: plan what is missing from the cache, encode it, write each block as a part, merge the parts."""

import contextlib
import time
from pathlib import Path

from ..cache.atomic import remove_leftovers, writer_lock
from ..cache.store import FeatureCache
from .backbones.base import DEFAULT_BACKBONE
from .backbones.opening import open_backbone
from .blocks import encode_plan, open_index, write_parts
from .contents import choose_contents, write_cache
from .encode import OnProgress
from .pairs.dataset import Dataset
from .plan import make_plan
from .request import FeaturizeOptions, complete_options, make_request, output_path, with_recorded_labels
from .summary import FeaturizeSummary, summarize


def featurize(
    data: str | Path,
    labels: str | Path | None = None,
    out: str | Path = "artifacts/features.h5",
    options: FeaturizeOptions | None = None,
    on_progress: OnProgress | None = None,
) -> FeaturizeSummary:
    """Encode every pair of ``data`` once and keep the embeddings in ``out``.

    Only missing rows are computed: pairs that are new, that changed, or that an interrupted run did not reach.

    Parameters
    ----------
    data
        A folder of ``<guid>.jpg`` + ``<guid>.txt``, or a manifest.
    labels
        CSV with header ``guid,tag``. The cache records its path, not its content.
    out
        The cache file.
    options
        Backbone, precision, views, tokens and so on.
    on_progress
        Called with (pairs done, pairs to do).

    Raises
    ------
    DataError
        No pairs at ``data``, a malformed labels file, or more rejects than allowed.
    CacheError
        ``out`` is from another backbone, schema or cleaning, from other data, or cannot be read.
    LockedError, DiskFullError, BackboneError
        Another process is writing ``out``, the disk is full, or the backbone cannot be used. Finished blocks are kept
        for the next run.
    """
    started = time.perf_counter()
    out = output_path(out)
    dataset = Dataset.open(data, labels)
    with writer_lock(out):
        remove_leftovers(out)
        with FeatureCache.open(out) if out.exists() else contextlib.nullcontext() as cached:
            if labels is None:
                dataset = with_recorded_labels(dataset, cached)
            options = complete_options(options or FeaturizeOptions(), cached)
            backbone = open_backbone(options.backbone or DEFAULT_BACKBONE, options.revision)
            request = make_request(out, dataset, backbone, options, cached)
            plan = make_plan(request, cached)
        with open_index(request, plan) as index:
            blocks = encode_plan(request, plan, index, on_progress)
            computed = write_parts(request, plan, blocks, index)
        contents = choose_contents(request, plan, computed)
        write_cache(request, contents, len(computed))
        return summarize(request, plan, computed, contents, started)
