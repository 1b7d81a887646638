"""A backbone without a model, for tests of the code around it."""

import threading

import numpy as np
from mmcli.featurize.backbones.base import Backbone, Encoded, Encoder

DIM = 6


class FreeEncoder(Encoder):
    """Embeds images by means of pixels and texts by sums of token ids, and counts both."""

    def __init__(self):
        self.images = self.texts = 0
        self.lock = threading.Lock()

    def prepare_image(self, image):
        values = np.asarray(image.resize((8, 8)), dtype=np.float32).transpose(2, 0, 1)
        return (values + 1) / 256  # so that a black image has no embedding of zeros

    def tokenize(self, texts):
        ids = [[1, *(ord(letter) for letter in text), 2] for text in texts]
        return [row[:20] for row in ids], [len(row) > 20 for row in ids]

    def encode_images(self, pixels, tokens=False):
        with self.lock:
            self.images += len(pixels)
        rows = [np.resize(row.mean(axis=2).ravel(), DIM) for row in pixels]
        states = [row.reshape(3, -1).T.astype(np.float16) for row in pixels] if tokens else None
        return Encoded(np.stack(rows).astype(np.float32), states)

    def encode_texts(self, ids, tokens=False):
        with self.lock:
            self.texts += len(ids)
        rows = [np.resize(np.array([sum(row), len(row), row[-1]]) / 100, DIM) for row in ids]
        states = [np.array(row, np.float16)[:, None] for row in ids] if tokens else None
        return Encoded(np.stack(rows).astype(np.float32), states)

    def text_layers(self):
        return []

    def vision_layers(self):
        return []

    def images_below(self, pixels, layers):
        raise AssertionError("the free backbone has no layers")

    texts_below = images_below

    def image_top(self, layers):
        raise AssertionError("the free backbone has no layers")

    text_top = image_top


class FreeBackbone(Backbone):
    """Keeps every encoder that it loaded."""

    name = "free"

    def __init__(self, version=1):
        self.version = version
        self.loaded = []

    def identity(self):
        return {"kind": "free", "version": self.version}

    def load(self, device, dtype, resize):
        self.loaded.append(FreeEncoder())
        return self.loaded[-1]

    @property
    def images(self):
        return sum(encoder.images for encoder in self.loaded)

    @property
    def texts(self):
        return sum(encoder.texts for encoder in self.loaded)
