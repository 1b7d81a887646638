"""evaluate and predict: what a best.pt is for."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .options import DataOption, LabelledOptions, OutputOption, TrainedOptions, parse_bytes

if TYPE_CHECKING:
    from ..heads.runs.predictor import Predictions


@dataclass(frozen=True, kw_only=True)
class Evaluate(LabelledOptions):
    """Score a trained head, with intervals.

    Example: mmcli evaluate --from artifacts/runs/latest/best.pt --on test
    """

    on: Annotated[
        Literal["held-out", "val", "test", "train", "new"],
        DataOption(help="Rows to score. held-out: val and test; new: labelled rows that the run has not seen."),
    ] = "held-out"
    data: Annotated[
        Path | None, DataOption(help="Folder or manifest of the raw pairs, if they were moved; only for stage 2.")
    ] = None

    def run(self) -> None:
        """Score the rows, and show the scores."""
        self.check_paths(best_pt=self.source, cache=self.cache)
        from ..featurize.backbones.opening import choose_device
        from ..heads import evaluate, open_best_pt
        from ..report.notes import note_about_run
        from ..report.progress import ProgressLine
        from ..report.tables import score_tables, shown_path

        parts: list[str] = ["val", "test"] if self.on == "held-out" else [self.on]
        model = open_best_pt(self.source, choose_device(self.device), data=self.data, backbone=self.backbone)
        if not model.layers and "stage1" not in model.checkpoint.made_from:
            self.refuse(["data", "backbone"], f"has no effect: {model.checkpoint.path} needs no raw pairs")
        with ProgressLine("frozen part") as progress:
            result = evaluate(model, self.cache, self.labels, parts, parse_bytes(self.max_memory), progress)
        note_about_run(result, offsets=model.checkpoint.recipe.offsets)
        title = f"{result.modality}, {result.fusion}: {shown_path(result.best_pt)}"
        self.show(result.to_dict(), title, *score_tables(result.scores, result.classes))


@dataclass(frozen=True, kw_only=True)
class Predict(TrainedOptions):
    """Predict the label of listed pairs, of a folder of pairs, or of one pair.

    Example: mmcli predict --ids test_without_label.txt --out submission.txt
    """

    ids: Annotated[Path | None, DataOption(help="CSV with the column guid: the pairs to predict, in order.")] = None
    data: Annotated[Path | None, DataOption(help="Folder or manifest of pairs, featurized or not.")] = None
    image: Annotated[Path | None, DataOption(help="One image file; needs --text.")] = None
    text: Annotated[str | None, DataOption(help="One text; needs --image.")] = None
    out: Annotated[Path | None, OutputOption(help="CSV file to write; default: print the CSV.")] = None
    probs: Annotated[bool, OutputOption("--probs", help="Add a column with the probability of each class.")] = False

    def run(self) -> None:
        """Predict, and write or print the predictions."""
        if (self.image is None) != (self.text is None):
            raise typer.BadParameter("--image and --text go together")
        if (self.image is None) == (self.ids is None and self.data is None):
            raise typer.BadParameter(
                "give --ids FILE, or --data FOLDER (with or without --ids), or --image with --text"
            )
        from ..report.terminal import note

        self.check_paths(best_pt=self.source, cache=self.cache)
        predictions = self._predict()
        left_out = [f"left out {reject.guid}: {reject.reason}" for reject in predictions.rejects]
        for text in (f"head: {predictions.head}", *predictions.notes, *left_out):
            note(text)
        if self.out is not None:
            predictions.write(self.out, self.probs)
        self._show(predictions)

    def _predict(self) -> "Predictions":
        """Predict, after a check that --out is no file that the command reads."""
        from ..cache.atomic import make_folder, refuse_to_overwrite
        from ..cache.machine import keep_freed_memory
        from ..report.progress import ProgressLine

        if self.out is not None:
            inputs = (self.source, self.ids, self.data, self.image, self.cache)
            refuse_to_overwrite(self.out, b"guid", [path for path in inputs if path])
            make_folder(self.out.parent)
        from ..featurize.backbones.opening import choose_device
        from ..heads import open_best_pt, predict

        keep_freed_memory()
        with ProgressLine("encode") as progress:
            model = open_best_pt(self.source, choose_device(self.device), backbone=self.backbone)
            # Labels look like predictions, and a head that learns from its own would score well.
            if self.out is not None:
                refuse_to_overwrite(self.out, b"guid", model.checkpoint.inputs(self.cache))
            pair = None if self.image is None or self.text is None else (self.image, self.text)
            return predict(model, self.ids, self.data, pair, self.cache, progress)

    def _show(self, predictions: "Predictions") -> None:
        from ..report.terminal import print_csv, print_json, print_parts

        classes, probs = predictions.classes, predictions.probs.tolist()
        if self.as_json:
            rows = zip(predictions.guids, predictions.labels, probs, strict=True)
            listed = [{"guid": guid, "tag": tag, "probs": of_row} for guid, tag, of_row in rows]
            left_out = [asdict(reject) for reject in predictions.rejects]
            out = None if self.out is None else str(self.out)
            print_json({"classes": classes, "predictions": listed, "left_out": left_out, "out": out})
        elif self.out is not None:
            print_parts(f"{self.out}: {len(predictions.guids)} predictions")
        elif self.image is not None:
            shown = ", ".join(f"{name} {prob:.3f}" for name, prob in zip(classes, probs[0], strict=True))
            print_parts(f"{predictions.labels[0]} ({shown})")
        else:
            print_csv(predictions.to_csv(self.probs))
