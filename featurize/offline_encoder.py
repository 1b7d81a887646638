"""The offline backbone, loaded. Importing this imports torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from PIL.Image import Image
from torch import nn

from .backbone import MAX_TOKENS, Encoded, Encoder
from .tensors import checked_resize, computing, low_precision, pad, to_float, to_half, tokenize

IMAGE_SIZE = 224
# The normalisation with which the image weights were published.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def orthonormal_projection(rows: int, columns: int, seed: int) -> NDArray[np.float32]:
    """Return a seeded random (rows, columns) matrix with orthonormal rows (or columns, whichever are fewer)."""
    gaussian = np.random.default_rng(seed).standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(gaussian)
    q = q * np.sign(np.diag(r))  # the sign convention of QR differs between libraries
    return np.ascontiguousarray(q.T if rows < columns else q, dtype=np.float32)


class OfflineEncoder(Encoder):
    """The two encoders, loaded; ``projection`` is (length of an embedding, seed)."""

    def __init__(
        self,
        text_folder: Path,
        image_weights: Path,
        projection: tuple[int, int],
        device: str,
        dtype: str,
        resize: int | None,
    ) -> None:
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(text_folder, local_files_only=True)
        text = transformers.AutoModel.from_pretrained(text_folder, local_files_only=True, dtype="float32")
        self.text_model = low_precision(text, dtype).eval().to(device)
        image = EfficientNet.from_name("efficientnet-lite0")
        image.load_state_dict(torch.load(image_weights, map_location="cpu", weights_only=True))
        # Depthwise convolutions are twice as fast on a CPU with channels last.
        self.image_model = low_precision(image, dtype).eval().to(device, memory_format=torch.channels_last)
        self.processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": resize or IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
        )
        self.text_projection = torch.from_numpy(orthonormal_projection(384, *projection)).to(device)
        self.image_projection = torch.from_numpy(orthonormal_projection(1280, *projection)).to(device)
        if resize is not None:
            checked_resize(self.processor, resize)
        self.device = device
        self.dtype = dtype

    def prepare_image(self, image: Image) -> NDArray[np.float32]:
        """Short side to 224, bicubic, centre crop, normalise."""
        return np.asarray(
            self.processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0],
            dtype=np.float32,
        )

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Tokenize with MiniLM's tokenizer."""
        return tokenize(self.tokenizer, texts, MAX_TOKENS)

    def encode_images(self, pixels: NDArray[np.float32], tokens: bool = False) -> Encoded:
        """Encode prepared images; tokens are the 7 x 7 positions of the last feature map, (49, 1280)."""
        with computing(self.device, self.dtype):
            batch = torch.from_numpy(pixels).to(self.device, memory_format=torch.channels_last)
            states = self.image_model.extract_features(batch)
        with torch.inference_mode():
            states = states.float().flatten(2).transpose(1, 2)
            pooled = states.mean(dim=1) @ self.image_projection
            return Encoded(to_float(pooled), list(to_half(states)) if tokens else None)

    def encode_texts(self, ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode B token lists, padded to the longest of them; tokens are (L, 384)."""
        padded, mask = pad(ids, self.tokenizer.pad_token_id, self.device)
        with computing(self.device, self.dtype):
            states = self.text_model(input_ids=padded, attention_mask=mask).last_hidden_state
        with torch.inference_mode():
            states = states.float()
            weight = mask.unsqueeze(2).float()
            pooled = (states * weight).sum(dim=1) / weight.sum(dim=1) @ self.text_projection
            kept = [state[: len(row)] for state, row in zip(to_half(states), ids, strict=True)] if tokens else None
            return Encoded(to_float(pooled), kept)

    def text_layers(self) -> list[nn.Module]:
        """Return MiniLM's six layers."""
        return list(self.text_model.encoder.layer)

    def vision_layers(self) -> list[nn.Module]:
        """Return EfficientNet's blocks."""
        return list(self.image_model._blocks)
