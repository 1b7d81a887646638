"""Hugging Face dual encoders (CLIP, SigLIP, Chinese-CLIP and their like), from the hub or a local folder.

transformers' own processor, tokenizer and ``get_image_features`` / ``get_text_features`` do the work; what they
return is already projected.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cache.errors import BackboneError
from .backbone import MAX_TOKENS, WAYS_OUT, Backbone, Encoder, sha256_of_file

_HUB_TIMEOUT = 10  # seconds
_SMALL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def weight_files(names: Sequence[str]) -> list[str]:
    """Return the weight files among ``names``: safetensors where there are any, else PyTorch pickles."""
    for kind in (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin"):
        found = sorted(name for name in names if re.fullmatch(kind + r"(\.index\.json)?", name))
        if found:
            return found
    return []


def small_files(names: Sequence[str]) -> list[str]:
    """Return the configuration and tokenizer files among ``names`` that are really loaded."""
    unused = {"vocab.json", "vocab.txt", "merges.txt"} if "tokenizer.json" in names else set()
    return [name for name in _SMALL_FILES if name in names and name not in unused]


def is_whole(names: Sequence[str]) -> bool:
    """Whether a folder with these files can be loaded."""
    tokenizers = {"tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"}
    processors = {"preprocessor_config.json", "processor_config.json"}
    there = set(names)
    return "config.json" in there and bool(weight_files(names) and tokenizers & there and processors & there)


def download(name: str, revision: str | None) -> tuple[Path, str]:
    """Return the local snapshot of hub model ``name`` and its commit; fetch it where it is not there yet.

    Raises
    ------
    BackboneError
        At once where the hub cannot be reached or does not have the model, naming the two ways out.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        snapshot = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        if is_whole([path.name for path in snapshot.iterdir()]):
            return snapshot, snapshot.name
    except LocalEntryNotFoundError:
        pass  # not fetched yet
    except HFValidationError as error:
        raise BackboneError(f"{name!r} is neither a folder nor a hub id: {WAYS_OUT}") from error
    try:
        # One quick question first: the download itself would retry for minutes.
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT)
        files = [sibling.rfilename for sibling in info.siblings or []]
        wanted = small_files(files) + weight_files(files)
        snapshot = Path(huggingface_hub.snapshot_download(name, revision=info.sha, allow_patterns=wanted))
    except GatedRepoError as error:
        raise BackboneError(
            f"{name} is gated: log in with `hf auth login` and accept its terms, or {WAYS_OUT}"
        ) from error
    except RevisionNotFoundError as error:
        raise BackboneError(f"the hub's {name} has no revision {revision!r}: leave --revision out") from error
    except RepositoryNotFoundError as error:
        raise BackboneError(f"the hub has no model {name!r} (or it is private): {WAYS_OUT}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BackboneError(f"no room to download {name}: free some space in the hub's cache folder") from error
        raise BackboneError(f"the hub cannot be reached for {name} ({error}): {WAYS_OUT}") from error
    except Exception as error:  # whatever the hub client's transport raises: all mean that it cannot be had now
        raise BackboneError(f"the hub cannot be reached for {name} ({error}): {WAYS_OUT}") from error
    return snapshot, snapshot.name


class HuggingFaceBackbone(Backbone):
    """A dual encoder in a local folder (for a hub model: its snapshot)."""

    def __init__(self, name: str, folder: Path, revision: str | None) -> None:
        self.name = name
        self.folder = folder
        self.revision = revision

    def identity(self) -> dict[str, Any]:
        """Hash every file that the processor, the tokenizer and the model are loaded from."""
        there = [path.name for path in self.folder.iterdir()]
        weights = weight_files(there)
        if "config.json" not in there or not weights:
            raise BackboneError(
                f"{self.folder} is not a model folder: expected config.json, preprocessor_config.json, tokenizer files "
                "and model.safetensors, as save_pretrained writes them"
            )
        files = small_files(there) + weights
        return {
            "kind": "huggingface",
            "files": {name: sha256_of_file(self.folder / name) for name in files},
            "pooling": "projected",
            "max_tokens": MAX_TOKENS,
        }

    def load(self, device: str, dtype: str, resize: int | None) -> Encoder:
        """Load model, processor and tokenizer from the folder alone; no code of the folder is run."""
        import transformers

        from .huggingface_encoder import HuggingFaceEncoder
        from .pixels import Preparer

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        try:
            model = transformers.AutoModel.from_pretrained(self.folder, local_files_only=True, dtype="float32")
            processor = transformers.AutoImageProcessor.from_pretrained(
                self.folder, local_files_only=True, backend="pil"
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a folder that is not whole
            raise BackboneError(f"{self.folder} cannot be loaded as a model: {error}") from error
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise BackboneError(
                f"{self.name} is a {type(model).__name__}, which has no image and text features: give a dual encoder "
                "such as CLIP, SigLIP or Chinese-CLIP"
            )
        return HuggingFaceEncoder(model, Preparer(processor, resize), tokenizer, device, dtype)
