"""The training rows of a fit as batches: shuffled, from memory or from the file, with random views of the images."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...cache.errors import MmcliError
from ...cache.features import Features
from ..model.head import Head
from ..model.inputs import Batch, Rows, at_least_float32, batch_starts, shuffled_blocks, state_batch, token_batches
from ..recipe import Recipe


@dataclass(frozen=True)
class _Block:
    """Rows on the device, as they are stored."""

    features: Features
    image: Tensor
    text: Tensor
    views: Tensor | None
    classes: Tensor


def _on_device(rows: Rows, device: str) -> _Block:
    """Copy rows from memory to the device."""
    features = rows.features
    views = None if features.views is None else torch.from_numpy(np.asarray(features.views)).to(device)
    image, text, classes = (
        torch.from_numpy(np.asarray(array)).to(device) for array in (features.image, features.text, rows.classes)
    )
    return _Block(features, image, text, views, classes)


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
        self.with_views = recipe.views and "image" not in rows.features.states
        if self.with_views and rows.features.views is None:
            raise MmcliError(
                "this recipe trains on augmented views, but these features have none: run `mmcli featurize` with "
                "--views, or leave views out"
            )
        self.resident = None if rows.features.places is not None else _on_device(rows, device)

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
            yield from self._batches_of(_on_device(Rows(block.features.load(), block.classes), self.device))

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
            yield head.standardised(batch), classes
