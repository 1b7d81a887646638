"""A loaded Hugging Face dual encoder. Importing this imports torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import nn

from .backbone import MAX_TOKENS, Encoded, Encoder
from .tensors import checked_resize, computing, low_precision, pad, to_float, to_half, tokenize


class HuggingFaceEncoder(Encoder):
    """A loaded dual encoder."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, device: str, dtype: str, resize: int | None) -> None:
        self.model = low_precision(model, dtype).eval().to(device)
        self.processor = processor
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype
        self.size = {} if resize is None else {"size": {"shortest_edge": checked_resize(processor, resize)}}
        text_config = model.config.text_config
        self.max_tokens = min(MAX_TOKENS, text_config.max_position_embeddings)
        # SigLIP was trained on texts padded to its full length, without a mask, and pools the last position.
        self.pads_to_full_length = model.config.model_type.startswith("siglip")

    def prepare_image(self, image: Image) -> NDArray[np.float32]:
        """Prepare one RGB image with the model's own processor."""
        # Said explicitly: of a picture three pixels high, the processor would take the rows for channels.
        prepared = self.processor(image, return_tensors="np", input_data_format="channels_last", **self.size)
        return np.asarray(prepared["pixel_values"][0], dtype=np.float32)

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Tokenize with the model's own tokenizer."""
        return tokenize(self.tokenizer, texts, self.max_tokens)

    def encode_images(self, pixels: NDArray[np.float32], tokens: bool = False) -> Encoded:
        """Encode prepared images, (B, 3, H, W) float32."""
        with computing(self.device, self.dtype):
            out = self.model.get_image_features(pixel_values=torch.from_numpy(pixels).to(self.device))
        states = to_half(out.last_hidden_state) if tokens else None
        return Encoded(to_float(out.pooler_output), None if states is None else list(states))

    def encode_texts(self, ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode B token lists, padded to the longest of them (SigLIP: to its full length)."""
        full = self.max_tokens if self.pads_to_full_length else None
        padded, mask = pad(ids, self.tokenizer.pad_token_id, self.device, full)
        with computing(self.device, self.dtype):
            inputs = {} if self.pads_to_full_length else {"attention_mask": mask}
            out = self.model.get_text_features(input_ids=padded, **inputs)
        states = None
        if tokens:
            lengths = [padded.shape[1] if self.pads_to_full_length else len(row) for row in ids]
            states = [state[:length] for state, length in zip(to_half(out.last_hidden_state), lengths, strict=True)]
        return Encoded(to_float(out.pooler_output), states)

    def text_layers(self) -> list[nn.Module]:
        """Return the transformer layers of the text tower."""
        stack = self.model.text_model.encoder
        return list(stack.layers if hasattr(stack, "layers") else stack.layer)  # layer: the BERT of Chinese-CLIP

    def vision_layers(self) -> list[nn.Module]:
        """Return the transformer layers of the image tower."""
        return list(self.model.vision_model.encoder.layers)
