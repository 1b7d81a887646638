"""Hugging Face dual encoders, such as CLIP, SigLIP and Chinese-CLIP, from the hub or a local folder.

transformers' own processor, tokenizer, ``get_image_features`` and ``get_text_features`` do the work. The features that
they return are already projected.
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
_PROCESSORS = {"preprocessor_config.json", "processor_config.json"}
_TOKENIZERS = {
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
}
_OTHERS = {"config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"}


def weight_files(names: Sequence[str]) -> list[str]:
    """Return the weight files among ``names``: safetensors if there are any, else PyTorch pickles."""
    for kind in (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin"):
        weights = sorted(name for name in names if re.fullmatch(kind + r"(\.index\.json)?", name))
        if weights:
            return weights
    return []


def small_files(names: Sequence[str]) -> list[str]:
    """Return the configuration and tokenizer files among ``names`` that are loaded."""
    unused = {"vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"} if "tokenizer.json" in names else set()
    return sorted((_OTHERS | _PROCESSORS | _TOKENIZERS) & set(names) - unused)


def missing_shards(folder: Path) -> list[str]:
    """Return the weight files that are missing in ``folder``: the index of a sharded model, or the files it names.

    Raise a BackboneError if the index cannot be read.
    """
    present = weight_files([path.name for path in folder.iterdir()])
    indices = [name for name in present if name.endswith(".index.json")]
    if {"model.safetensors", "pytorch_model.bin"} & set(present):  # transformers loads these first
        return []
    if not indices:
        return ["model.safetensors.index.json"]
    try:
        named = set(json.loads((folder / indices[0]).read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(named - set(present))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{folder / indices[0]} is not an index of weights ({error}): download the model again"
        ) from error


def is_whole(folder: Path) -> bool:
    """Whether ``folder`` holds all files that a model is loaded from."""
    present = {path.name for path in folder.iterdir()}
    with contextlib.suppress(BackboneError):
        has_weights = bool(weight_files(list(present))) and not missing_shards(folder)
        return has_weights and "config.json" in present and bool(_TOKENIZERS & present and _PROCESSORS & present)
    return False


@contextlib.contextmanager
def only(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder with links to ``names`` and nothing else, so that only hashed files can be loaded."""
    with tempfile.TemporaryDirectory(prefix="mmcli-") as links:
        for name in names:
            (Path(links) / name).symlink_to((folder / name).resolve())
        yield Path(links)


def download(name: str, revision: str | None) -> tuple[Path, str]:
    """Return the local snapshot of hub model ``name`` and its commit; download it if it is not complete.

    Raise a BackboneError at once, with two ways out, if the hub cannot be reached or does not have the model.
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
        pass  # not downloaded yet
    except HFValidationError as error:
        raise BackboneError(f"{name!r} is neither a folder nor a hub id: {WAYS_OUT}") from error
    try:
        # Ask for the file list first, because a download would retry for minutes.
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT)
        files = [sibling.rfilename for sibling in info.siblings or []]
        wanted = small_files(files) + weight_files(files)
        snapshot = Path(huggingface_hub.snapshot_download(name, revision=info.sha, allow_patterns=wanted))
    except GatedRepoError as error:
        raise BackboneError(
            f"{name} is gated: log in with `hf auth login` and accept its terms, or {WAYS_OUT}"
        ) from error
    except RevisionNotFoundError as error:
        raise BackboneError(
            f"{name} has no revision {revision!r} on the hub: give another --revision, or leave it out"
        ) from error
    except RepositoryNotFoundError as error:
        raise BackboneError(f"the hub has no model {name!r} (or it is private): {WAYS_OUT}") from error
    except Exception as error:  # the hub client's transport raises exceptions of many kinds
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise BackboneError(f"no disk space to download {name}: free some in the hub's cache folder") from error
        raise BackboneError(f"the hub cannot be reached for {name} ({error}): {WAYS_OUT}") from error
    return snapshot, snapshot.name


class HuggingFaceBackbone(Backbone):
    """A dual encoder in a local folder, which may be the snapshot of a hub model."""

    def __init__(self, name: str, folder: Path, revision: str | None) -> None:
        self.name, self.folder, self.revision = name, folder, revision

    def _files(self) -> list[str]:
        """Return the names of the files that processor, tokenizer and model are loaded from."""
        present = [path.name for path in self.folder.iterdir()]
        weights = weight_files(present)
        if "config.json" not in present or not weights:
            raise BackboneError(
                f"{self.folder} is not a model folder: expected config.json, preprocessor_config.json, tokenizer files "
                "and model.safetensors, as save_pretrained writes them"
            )
        if absent := missing_shards(self.folder):
            raise BackboneError(
                f"{self.folder} lacks {len(absent)} weight files, such as {absent[0]!r}: expected model.safetensors, "
                "or an index and the files that it names, such as model-00001-of-00002.safetensors. Download it again"
            )
        if "adapter_config.json" in present:
            raise BackboneError(
                f"{self.folder} holds an adapter (adapter_config.json), which mmcli does not apply: merge it into the "
                "model (merge_and_unload) and save that, or remove the adapter's files"
            )
        return small_files(present) + weights

    def identity(self) -> dict[str, Any]:
        """Hash every file that the processor, the tokenizer and the model are loaded from."""
        return {
            "kind": "huggingface",
            "files": {name: sha256_of_file(self.folder / name) for name in self._files()},
            "pooling": "projected",
            "max_tokens": MAX_TOKENS,
        }

    def load(self, device: str, dtype: str, resize: int | None) -> Encoder:
        """Load model, processor and tokenizer from the hashed files only. Code in the folder is never run.

        Raise a BackboneError if the files cannot be loaded, belong to different models, or are not a dual encoder.
        """
        import transformers

        from .huggingface_encoder import HuggingFaceEncoder
        from .matching import check_encoder, check_tokenizer, check_weights
        from .tensors import make_preparer

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        safe = {"local_files_only": True, "trust_remote_code": False}
        with only(self.folder, self._files()) as links:
            try:
                model, loaded = transformers.AutoModel.from_pretrained(
                    links, dtype="float32", output_loading_info=True, ignore_mismatched_sizes=True, **safe
                )
                processor = transformers.AutoImageProcessor.from_pretrained(links, backend="pil", **safe)
                tokenizer = transformers.AutoTokenizer.from_pretrained(links, **safe)
            except Exception as error:  # transformers raises many kinds of errors for an incomplete folder
                reason = str(error).replace(str(links), str(self.folder))
                raise BackboneError(f"{self.folder} cannot be loaded as a model: {reason}") from error
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise BackboneError(
                f"{self.name} is a {type(model).__name__}, which has no image and text features: give a dual encoder "
                "such as CLIP, SigLIP or Chinese-CLIP"
            )
        check_weights(model, loaded, self.folder)
        check_tokenizer(tokenizer, model, self.folder)
        try:
            prepare = make_preparer(processor, resize)
        except (AttributeError, TypeError, ValueError) as error:
            raise BackboneError(f"the image processor in {self.folder} cannot be used: {error}") from error
        encoder = HuggingFaceEncoder(model, prepare, tokenizer, device, dtype)
        check_encoder(encoder, self.folder)
        return encoder
