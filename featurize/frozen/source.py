"""Where stage 2 goes back to: the backbone of a cache, and its raw pairs. Both are opened when they are needed."""

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
    """The backbone with which features of ``identity`` were made.

    Parameters
    ----------
    identity
        Of the features (see ``cache.schema.Header``).
    backbone
        ``{"name", "revision"}``: where the backbone is.
    device
        A torch device.
    data
        Where the raw pairs are; default: as recorded in the cache.
    """

    def __init__(
        self, identity: dict[str, Any], backbone: dict[str, Any], device: str = "cpu", data: str | Path | None = None
    ) -> None:
        if data is not None and not Path(data).exists():
            raise DataError(f"no such folder or manifest: {data}")
        self.identity, self.place, self.device, self.data = identity, backbone, device, data
        self._backbone: Backbone | None = None
        self._encoders: dict[str, Encoder] = {}
        self._datasets: dict[str, Dataset] = {}

    def encoder(self, dtype: str | None = None) -> Encoder:
        """Return the loaded backbone, in the precision of the features or in ``dtype``.

        Raises
        ------
        BackboneError
            It cannot be had, or what is there is another one.
        """
        dtype = dtype or self.identity["dtype"]
        if dtype not in self._encoders:
            if self._backbone is None:
                self._backbone = open_same(self.identity, self.place)
            self._encoders[dtype] = self._backbone.load(self.device, dtype, self.identity["image"]["resize"])
        return self._encoders[dtype]

    def layer_counts(self, layers: Mapping[str, int]) -> dict[str, int]:
        """Return how many layers are unfrozen, by tower, with the number of all layers in place of a negative one.

        Raises
        ------
        BackboneError
            More layers are to be unfrozen than a tower has.
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
            del self._encoders["float32"]  # needed for nothing else, and large
        return tops

    def forget(self) -> None:
        """Let go of the loaded backbone."""
        self._encoders.clear()

    def dataset(self, cache: FeatureCache) -> Dataset:
        """Return the raw pairs of ``cache``."""
        place = str(self.data or cache.header.dataset["data"])
        if not Path(place).exists():
            raise DataError(f"no such folder or manifest: {place}; say with --data where the raw pairs are now")
        if place not in self._datasets:
            self._datasets[place] = Dataset.open(place)
        return self._datasets[place]
