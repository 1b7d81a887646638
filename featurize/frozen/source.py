"""The backbone and the raw pairs of a cache, for stage 2. Each is opened on first use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...cache.errors import DataError
from ...cache.store import FeatureCache
from ..backbones.base import Backbone, Encoder
from ..backbones.towers import Top, check_layers
from ..embed import open_same
from ..pairs.dataset import Dataset


class Source:
    """The backbone that made features of ``identity``, and the raw pairs.

    Parameters
    ----------
    identity
        Identity of the features (see ``cache.schema.Header``).
    backbone
        ``{"name", "revision"}``: location of the backbone.
    device
        A torch device.
    data
        Path of the raw pairs. Default: as recorded in the cache.
    """

    def __init__(
        self, identity: dict[str, Any], backbone: dict[str, Any], device: str = "cpu", data: str | Path | None = None
    ) -> None:
        if data is not None and not Path(data).exists():
            raise DataError(f"no such folder or manifest: {data}: give the path of the raw pairs with --data")
        self.identity, self.place, self.device, self.data = identity, backbone, device, data
        self._backbone: Backbone | None = None
        self._encoders: dict[str, Encoder] = {}
        self._datasets: dict[str, Dataset] = {}

    def encoder(self, dtype: str | None = None) -> Encoder:
        """Return the loaded backbone, in the precision of the features or in ``dtype``.

        Raises
        ------
        BackboneError
            The backbone cannot be opened, or is a different one.
        """
        dtype = dtype or self.identity["dtype"]
        if dtype not in self._encoders:
            if self._backbone is None:
                self._backbone = open_same(self.identity, self.place)
            self._encoders[dtype] = self._backbone.load(self.device, dtype, self.identity["image"]["resize"])
        return self._encoders[dtype]

    def layer_counts(self, layers: Mapping[str, int]) -> dict[str, int]:
        """Return the number of unfrozen layers by tower; a negative number means all layers.

        Raises
        ------
        BackboneError
            A tower has fewer layers.
        """
        encoder = self.encoder("float32")
        counts = {}
        for tower, count in layers.items():
            present = encoder.text_layers() if tower == "text" else encoder.vision_layers()
            counts[tower] = len(present) if count < 0 else count
            check_layers(present, counts[tower], tower)
        return counts

    def tops(self, layers: Mapping[str, int]) -> dict[str, Top]:
        """Return the last layers of each tower, in float32; copy them before training."""
        encoder = self.encoder("float32")
        cutters = {"text": encoder.text_top, "image": encoder.image_top}
        tops = {tower: cutters[tower](count) for tower, count in layers.items()}
        if self.identity["dtype"] != "float32":
            del self._encoders["float32"]  # large, and not used for anything else
        return tops

    def forget(self) -> None:
        """Release the loaded backbone."""
        self._encoders.clear()

    def dataset(self, cache: FeatureCache) -> Dataset:
        """Return the raw pairs of ``cache``."""
        place = str(self.data or cache.header.dataset["data"])
        if not Path(place).exists():
            raise DataError(f"no such folder or manifest: {place}: give the path of the raw pairs with --data")
        if place not in self._datasets:
            self._datasets[place] = Dataset.open(place)
        return self._datasets[place]
