"""Hugging Face dual encoders (CLIP, SigLIP, Chinese-CLIP and their like), from the hub or a local folder.

transformers' own processor, tokenizer and ``get_image_features`` / ``get_text_features`` do the work; what they
return is already projected.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...cache.errors import BackboneError
from .base import MAX_TOKENS, WAYS_OUT, Backbone, Encoder, sha256_of_file

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
    "tokenizer.model",
)
_TOKENIZERS = {
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
}
_PROCESSORS = {"preprocessor_config.json", "processor_config.json"}


def weight_files(names: Sequence[str]) -> list[str]:
    """Return the weight files among ``names``: safetensors where there are any, else PyTorch pickles."""
    for kind in (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin"):
        found = sorted(name for name in names if re.fullmatch(kind + r"(\.index\.json)?", name))
        if found:
            return found
    return []


def small_files(names: Sequence[str]) -> list[str]:
    """Return the configuration and tokenizer files among ``names`` that are really loaded."""
    unused = {"vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"} if "tokenizer.json" in names else set()
    return [name for name in _SMALL_FILES if name in names and name not in unused]


def missing_shards(folder: Path) -> list[str]:
    """Return the weight files that ``folder`` lacks: the index of a sharded model, or what that names.

    Raises
    ------
    BackboneError
        There is an index, and it cannot be read.
    """
    there = weight_files([path.name for path in folder.iterdir()])
    indices = [name for name in there if name.endswith(".index.json")]
    if {"model.safetensors", "pytorch_model.bin"} & set(there):  # which is loaded, whatever else there is
        return []
    if not indices:
        return ["model.safetensors.index.json"]
    try:
        named = set(json.loads((folder / indices[0]).read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(named - set(there))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{folder / indices[0]} is not an index of weights ({error}): get the model again"
        ) from error


def is_whole(folder: Path) -> bool:
    """Whether all that a model is loaded from is in ``folder``."""
    there = {path.name for path in folder.iterdir()}
    with contextlib.suppress(BackboneError):
        complete = bool(weight_files(list(there))) and not missing_shards(folder)
        return complete and "config.json" in there and bool(_TOKENIZERS & there and _PROCESSORS & there)
    return False


@contextlib.contextmanager
def only(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder that holds links to ``names`` and nothing else, so that what is not hashed cannot be loaded."""
    with tempfile.TemporaryDirectory(prefix="mmcli-") as shown:
        for name in names:
            (Path(shown) / name).symlink_to((folder / name).resolve())
        yield Path(shown)


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
        if is_whole(snapshot):
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

    def _files(self) -> list[str]:
        """Return the names of the files that processor, tokenizer and model are loaded from."""
        there = [path.name for path in self.folder.iterdir()]
        weights = weight_files(there)
        if "config.json" not in there or not weights:
            raise BackboneError(
                f"{self.folder} is not a model folder: expected config.json, preprocessor_config.json, tokenizer files "
                "and model.safetensors, as save_pretrained writes them"
            )
        if absent := missing_shards(self.folder):
            raise BackboneError(
                f"{self.folder} lacks {len(absent)} of its weight files, the first is {absent[0]!r}: expected "
                "model.safetensors, or an index and the files that it names, such as model-00001-of-00002.safetensors, "
                "in that very folder; get it again"
            )
        if "adapter_config.json" in there:
            raise BackboneError(
                f"{self.folder} holds an adapter (adapter_config.json), which would not be applied: merge it into the "
                "model (merge_and_unload) and save that, or take the adapter's files out"
            )
        return small_files(there) + weights

    def identity(self) -> dict[str, Any]:
        """Hash every file that the processor, the tokenizer and the model are loaded from."""
        return {
            "kind": "huggingface",
            "files": {name: sha256_of_file(self.folder / name) for name in self._files()},
            "pooling": "projected",
            "max_tokens": MAX_TOKENS,
        }

    def load(self, device: str, dtype: str, resize: int | None) -> Encoder:
        """Load model, processor and tokenizer from the hashed files alone; no code of the folder is run.

        Raises
        ------
        BackboneError
            The files cannot be loaded, are not of one model, or that is no dual encoder.
        """
        import transformers

        from .huggingface_encoder import HuggingFaceEncoder
        from .matching import check_encoder, check_tokenizer, check_weights
        from .pixels import Preparer

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        safe = {"local_files_only": True, "trust_remote_code": False}
        with only(self.folder, self._files()) as shown:
            try:
                model, loaded = transformers.AutoModel.from_pretrained(
                    shown, dtype="float32", output_loading_info=True, ignore_mismatched_sizes=True, **safe
                )
                processor = transformers.AutoImageProcessor.from_pretrained(shown, backend="pil", **safe)
                tokenizer = transformers.AutoTokenizer.from_pretrained(shown, **safe)
            except Exception as error:  # transformers raises many kinds for a folder that is not whole
                said = str(error).replace(str(shown), str(self.folder))
                raise BackboneError(f"{self.folder} cannot be loaded as a model: {said}") from error
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise BackboneError(
                f"{self.name} is a {type(model).__name__}, which has no image and text features: give a dual encoder "
                "such as CLIP, SigLIP or Chinese-CLIP"
            )
        check_weights(model, loaded, self.folder)
        check_tokenizer(tokenizer, model, self.folder)
        try:
            prepare = Preparer(processor, resize)
        except (AttributeError, TypeError, ValueError) as error:
            raise BackboneError(f"the image processor in {self.folder} cannot be used: {error}") from error
        encoder = HuggingFaceEncoder(model, prepare, tokenizer, device, dtype)
        check_encoder(encoder, self.folder)
        return encoder
