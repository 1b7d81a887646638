"""best.pt of stage 2: a head, and the layers of the backbone that were trained with it; nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..heads.runs.checkpoint import FINETUNED, Checkpoint, Stored, header_of, tensors_of, write_best_pt
from ..heads.runs.tensor_file import check_tensor
from .recipe import FinetuneRecipe, recipe_for


@dataclass
class FinetunedCheckpoint:
    """What is needed to use a head whose backbone was trained on.

    Attributes
    ----------
    checkpoint
        The heads; ``made_from`` names the best.pt of stage 1, too. ``identity`` is that of the features of stage 1.
    settings
        Of stage 2.
    changed
        For each head, the weights of the unfrozen layers by their names in the whole model.
    """

    checkpoint: Checkpoint
    settings: FinetuneRecipe
    changed: list[dict[str, Tensor]]

    def save(self, path: Path) -> None:
        """Write ``path`` atomically."""
        header = header_of(self.checkpoint) | {"finetune": self.settings.to_dict()}
        tensors = {"tensors": tensors_of(self.checkpoint.head), "changed": self.changed}
        write_best_pt(path, FINETUNED, header, tensors)

    @classmethod
    def of(cls, stored: Stored, device: str = "cpu") -> FinetunedCheckpoint:
        """Take apart a best.pt that was read; a CheckpointError says what does not fit."""
        with stored.must_fit():
            checkpoint, changed = stored.checkpoint(device), stored.content["changed"]
            settings = recipe_for(checkpoint.recipe.modality, stored.header()["finetune"])
            if not isinstance(changed, list) or len(changed) != len(checkpoint.seeds):
                raise ValueError(f"not one set of layers for each of {len(checkpoint.seeds)} heads")
            for name, tensor in (item for weights in changed for item in dict(weights).items()):
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"{name} is no tensor")
                check_tensor(name, tensor)
            return cls(checkpoint, settings, changed)
