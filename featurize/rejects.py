"""Pairs that are left out: how many are allowed, and the list of them beside the cache."""

from collections.abc import Sequence
from pathlib import Path

from ..cache.atomic import write_text
from ..cache.errors import DataError
from ..cache.labels import table_text
from .pairs.hashing import Reject
from .plan import Plan
from .request import Request


def rejects_path(out: Path) -> Path:
    """Return the path of the list of rejects beside a cache."""
    return out.with_name(out.name + ".rejects.csv")


def write_rejects(out: Path, rejects: Sequence[Reject]) -> None:
    """Write the list of rejects; remove the old list if there are none."""
    path = rejects_path(out)
    if not rejects:
        path.unlink(missing_ok=True)
        return
    rows = ([reject.guid, reject.reason, reject.path] for reject in rejects)
    write_text(path, table_text(["guid", "reason", "path"], rows))


def refuse_too_many(request: Request, plan: Plan, rejects: Sequence[Reject]) -> None:
    """Stop if more pairs are rejected than allowed. Labels without a pair do not count.

    Raises
    ------
    DataError
        Too many rejects. They are listed beside the cache.
    """
    dataset, rate = request.dataset, request.options.max_reject_rate
    if len(rejects) - plan.absent <= rate * (len(dataset.pairs) - dataset.join.labels_without_pair):
        return
    write_rejects(request.out, rejects)
    raise DataError(
        f"at least {len(rejects)} of {len(dataset.pairs)} pairs cannot be read, more than --max-reject-rate {rate:g} "
        f"allows: see {rejects_path(request.out)}, fix these pairs or raise the rate, and run the same command again; "
        "finished blocks are kept"
    )
