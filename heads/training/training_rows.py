"""The training rows of a fit as batches: shuffled, from memory or from the file, with random views of the images."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...cache.errors import MmcliError
from ...cache.features import Features
from ..model.head import Head, predict_parts
from ..model.inputs import Batch, Rows, at_least_float32, state_batch, token_batches
from ..recipe import Recipe

_STRETCH_ROWS = 1024  # rows of a file that are read in one go
# Training rows up to this size are standardised once, in a second copy: a step takes a seventh less.
_STANDARDISED_BYTES = 64 << 20


@dataclass(frozen=True)
class _Block:
    """Rows on the device. A small set is standardised once, a large set is standardised batch by batch."""

    features: Features
    image: Tensor
    text: Tensor
    views: Tensor | None
    classes: Tensor
    is_standardised: bool = False


def _on_device(rows: Rows, head: Head, device: str) -> _Block:
    """Copy rows from memory to the device."""
    features = rows.features
    views = None if features.views is None else torch.from_numpy(np.asarray(features.views)).to(device)
    image, text, classes = (
        torch.from_numpy(np.asarray(array)).to(device) for array in (features.image, features.text, rows.classes)
    )
    if head.tops or 4 * (image.numel() + text.numel() + (0 if views is None else views.numel())) > _STANDARDISED_BYTES:
        return _Block(features, image, text, views, classes)
    image, text, *_ = head.standardised(Batch(image.float(), text.float()))
    if views is not None:
        views = head.image_input(views.flatten(0, 1).float()).unflatten(0, views.shape[:2])
    return _Block(features, image, text, views, classes, is_standardised=True)


class TrainingRows:
    """Training rows, in a new order in every epoch. Rows left in the file come in blocks that fit in memory."""

    def __init__(self, rows: Rows, head: Head, recipe: Recipe, batch_size: int, device: str) -> None:
        self.rows, self.head, self.batch_size, self.device, self.seed = rows, head, batch_size, device, recipe.seed
        # The order of rows depends only on the seed, so that it is the same for every fusion.
        self.order = torch.Generator().manual_seed(recipe.seed)
        # Views have their own seed, or the view of a row would depend on its place in the epoch.
        view_seed = int(np.random.SeedSequence([recipe.seed, 1]).generate_state(1)[0])
        self.which_view = torch.Generator().manual_seed(view_seed)
        self.order_in_stage2: np.random.Generator | None = None
        self.with_views = recipe.views and "image" not in head.tops
        if self.with_views and rows.features.views is None:
            raise MmcliError(
                "this recipe trains on augmented views, but these features have none: run `mmcli featurize` with "
                "--views, or leave views out"
            )
        self.resident = None if rows.features.places is not None else _on_device(rows, head, device)

    def reseed(self, epoch: int) -> None:
        """Make order and dropout depend only on seed and epoch, so that a resumed stage 2 gives the same result."""
        self.order_in_stage2 = np.random.default_rng([self.seed, epoch])
        seed = int(self.order_in_stage2.integers(2**63))
        torch.manual_seed(seed)
        self.order.manual_seed(seed)
        self.which_view.manual_seed(seed ^ 1)

    def batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the batches of one epoch, as the fusion sees them, and their classes, (b,) int64."""
        if self.resident is not None:
            yield from self._batches_of(self.resident)
            return
        for numbers in shuffled_blocks(self.rows.features, self.order):
            block = self.rows.take(numbers)
            yield from self._batches_of(_on_device(Rows(block.features.load(), block.classes), self.head, self.device))

    def _batches_of(self, block: _Block) -> Iterator[tuple[Batch, Tensor]]:
        n_rows, size, head = len(block.classes), self.batch_size, self.head
        if self.order_in_stage2 is None:
            order = torch.randperm(n_rows, generator=self.order)
        else:
            order = torch.from_numpy(self.order_in_stage2.permutation(n_rows))
        starts = batch_starts(n_rows, size)
        if not starts:
            return
        order = order[: len(starts) * size]
        view = None
        if self.with_views and block.views is not None:
            view = torch.randint(block.views.shape[1], (n_rows,), generator=self.which_view).to(self.device)
        numbers = order.numpy()
        all_tokens = token_batches(block.features, head.needs_tokens, numbers, size, self.device)
        order = order.to(self.device)
        for start, tokens in zip(starts, all_tokens, strict=True):
            rows = order[start : start + size]
            if view is None or block.views is None:
                image = block.image.index_select(0, rows)
            else:
                image = block.views[rows, view.index_select(0, rows)]
            text, classes = block.text.index_select(0, rows), block.classes.index_select(0, rows)
            states = state_batch(block.features, numbers[start : start + size], self.device) if head.tops else {}
            batch = Batch(at_least_float32(image), at_least_float32(text), tokens, states)
            yield batch if block.is_standardised else head.standardised(batch), classes

    def logits(self) -> Tensor:
        """Return the mean logits of the MLPs of the head for all rows, (n, C)."""
        block = self.resident
        if block is None or not block.is_standardised or self.head.needs_tokens:
            return predict_parts(self.head, self.rows.features).mean(dim=0)
        with torch.inference_mode():
            return self.head.parts(Batch(block.image, block.text)).mean(dim=0)


def shuffled_blocks(features: Features, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of rows left in a file, in blocks that fit in memory; each row comes once.

    A block consists of stretches of the file, drawn at random. Each stretch is read in one go, so an epoch reads the
    file once.
    """
    assert features.places is not None
    order = np.argsort(features.places, kind="stable")
    stretches = np.split(order, range(_STRETCH_ROWS, len(order), _STRETCH_ROWS))
    drawn = torch.randperm(len(stretches), generator=generator).numpy()
    per_block = stretches_per_block(features)
    for start in range(0, len(drawn), per_block):
        yield np.concatenate([stretches[number] for number in np.sort(drawn[start : start + per_block])])


def stretches_per_block(features: Features) -> int:
    """Return how many stretches of a file are in memory at once."""
    return max(1, features.at_once // _STRETCH_ROWS)


def batch_starts(n_rows: int, size: int) -> range:
    """Return where the batches of ``n_rows`` shuffled rows start.

    A last batch of a single row is left out of this epoch, because BatchNorm has no variance for it.
    """
    return range(0, n_rows - 1, size)


def steps_per_epoch(features: Features, size: int) -> int:
    """Return how many batches the training rows have at most; rows left in a file have a smaller batch per block.

    Only the last stretch of a file is short. Where it is drawn, in the last block or before, changes the number.
    """
    if features.places is None:
        return len(batch_starts(len(features), size))
    per_block, n_rows = stretches_per_block(features), len(features)
    lengths = [min(_STRETCH_ROWS, n_rows - start) for start in range(0, n_rows, _STRETCH_ROWS)]
    return max(
        sum(len(batch_starts(sum(order[start : start + per_block]), size)) for start in range(0, len(order), per_block))
        for order in (lengths, lengths[::-1])
    )
