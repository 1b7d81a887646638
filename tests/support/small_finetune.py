"""What tests of stage 2 share: a trained head with all that stage 2 needs, and a naive loop with the whole model."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from mmcli.cache import FeatureCache, read_labels
from mmcli.cache.states import States, StatesPart
from mmcli.featurize.pairs.text import clean_text, decode_text
from mmcli.featurize.source import Source
from mmcli.heads.model.inputs import Batch, batches
from mmcli.heads.model.losses import class_weights
from mmcli.heads.runs.checkpoint import load_checkpoint
from mmcli.heads.runs.labelled import rows_of_parts
from mmcli.heads.runs.last_layers import open_last_layers
from mmcli.heads.training.loop import FitOptions, fit
from tolerances import close_rows

CLASSES = ("negative", "neutral", "positive")
QUICK = {"epochs": 2, "batch_size": 16, "lr_backbone": 1e-3, "lr_head": 1e-3, "patience": 5}
LEARNS = QUICK | {"lr_backbone": 3e-4}


def read_best_pt(path):
    """Return content and header of a best.pt, as PyTorch and json read them."""
    content = torch.load(path, weights_only=True)
    return content, json.loads(content["header"])


def interrupt_at(step):
    """Return what presses Ctrl-C at a step."""

    def on_step(done, total):
        if done == step:
            raise KeyboardInterrupt

    return on_step


class Ready:
    """A head of stage 1 with all that stage 2 needs, as ``finetune`` puts it together."""

    def __init__(self, best_pt, **settings):
        self.checkpoint = load_checkpoint(best_pt)
        self.recipe = self.checkpoint.recipe.with_finetune(QUICK | settings)
        self.settings = self.recipe.finetune
        source = Source(self.checkpoint.identity, self.checkpoint.backbone)
        self.head = self.checkpoint.head.heads[0]
        parts = self.checkpoint.split.named()
        labels = read_labels(self.checkpoint.made_from["labels"])
        with FeatureCache.open(self.checkpoint.made_from["cache"]) as cache:
            rows = rows_of_parts(cache, parts, labels, self.checkpoint.classes, self.checkpoint.recipe)
            layers = open_last_layers(cache, self.settings, source, parts, rows)
            self.data = cache.header.dataset["data"]
        self.rows = layers.rows
        self.model = copy.deepcopy(self.head)
        self.model.attach(layers.tops)

    def fit(self, device="cpu"):
        """Train the model in place."""
        options = FitOptions(device)
        n_classes = len(self.checkpoint.classes)
        return fit(self.recipe, n_classes, self.rows["train"], self.rows["val"], options, self.model)

    def in_float64(self, whole):
        """Return the same in float64: ``whole`` computes the states below the cut and the embeddings of frozen towers.

        Those of ``finetune`` are float32, and are compared with them.
        """
        made = copy.copy(self)
        made.head, made.model = copy.deepcopy(self.head).double(), copy.deepcopy(self.model).double()
        guids = self.checkpoint.split.named()
        made.rows = {
            part: replace(rows, features=whole.features(guids[part], rows.features)) for part, rows in self.rows.items()
        }
        return made

    def first_batch(self, size=16):
        """Return the first rows of the training part as one batch, and their class numbers."""
        features = self.rows["train"].features.take(np.arange(size))
        return next(batches(features, self.model.needs_tokens, "cpu")), torch.from_numpy(
            self.rows["train"].classes[:size]
        )


class Naive:
    """The plain loop: raw pairs through the whole model in every step, written without anything of ``finetune``.

    Everything is in float64: ``whole`` is the backbone, ``ready`` has the head.
    """

    def __init__(self, ready, whole):
        self.ready, self.whole = ready, whole
        self.head = copy.deepcopy(ready.head)
        counts = np.bincount(ready.rows["train"].classes)
        weight = torch.from_numpy(class_weights(counts, ready.checkpoint.recipe.class_weights))
        self.loss = torch.nn.CrossEntropyLoss(weight.double())

    def train_one_epoch(self):
        settings, recipe, train = self.ready.settings, self.ready.checkpoint.recipe, self.ready.rows["train"]
        groups = [
            {"params": list(self.whole.unfrozen.values()), "lr": settings.lr_backbone},
            {"params": list(self.head.parameters()), "lr": settings.lr_head},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
        random = np.random.default_rng([recipe.seed, 1])
        torch.manual_seed(int(random.integers(2**63)))
        order = random.permutation(len(train))
        per_epoch = -(-len(train) // settings.batch_size)
        guids = self.ready.checkpoint.split.train
        self.head.train()
        for step in range(per_epoch):
            rows = order[step * settings.batch_size : (step + 1) * settings.batch_size]
            for group, rate in zip(optimizer.param_groups, (settings.lr_backbone, settings.lr_head), strict=True):
                group["lr"] = rate * settings.factor(step, settings.epochs * per_epoch)
            logits = self.head(self.whole.embed([guids[row] for row in rows]))
            optimizer.zero_grad()
            self.loss(logits, torch.from_numpy(train.classes[rows])).backward()
            optimizer.step()
        return per_epoch


@dataclass
class Whole:
    """A whole backbone in float64, at least from the first unfrozen layer on.

    ``embed(guids)`` returns the head's batch, with gradients; ``unfrozen`` holds the parameters that are trained, by
    name, and ``first`` the first unfrozen layer of each tower.
    """

    embed: Callable
    unfrozen: dict
    first: dict
    model: torch.nn.Module | None = None

    def __post_init__(self):
        self.entered = {}
        for tower, layer in self.first.items():

            def catch(_, args, kwargs, tower=tower):
                self.entered[tower] = (args[0] if args else kwargs["hidden_states"]).detach().numpy()

            layer.register_forward_pre_hook(catch, with_kwargs=True)

    def features(self, guids, computed):
        """Return in float64 what ``computed``, some ``Features``, holds of these pairs, one pair at a time."""
        embeddings, states = {"image": [], "text": []}, {tower: [] for tower in self.first}
        with torch.no_grad():
            for guid in guids:
                batch = self.embed([guid])
                for side, kept in embeddings.items():
                    kept.append(getattr(batch, side)[0].numpy())
                for tower, kept in states.items():
                    kept.append(self.entered[tower][0])
        features = replace(computed, **{side: np.stack(kept) for side, kept in embeddings.items()})
        for side in set(embeddings) - set(states):
            close_rows(getattr(computed, side), getattr(features, side))
        places = np.stack([np.zeros(len(guids), np.int64), np.arange(len(guids))], axis=1)
        parts = {}
        for tower, kept in states.items():
            theirs = computed.states[tower].padded()
            if theirs.mask is None:
                parts[tower] = StatesPart(np.stack(kept))
                close_rows(theirs.states.reshape(len(guids), -1), parts[tower].states.reshape(len(guids), -1))
                continue
            lengths, inside = theirs.mask.sum(axis=1).tolist(), theirs.mask.astype(bool)
            joined = np.concatenate([state[:length] for state, length in zip(kept, lengths, strict=True)])
            close_rows(theirs.states[inside], joined)
            parts[tower] = StatesPart(joined, np.cumsum([0, *lengths]), theirs.ids[inside].astype(np.int32))
        return replace(features, states={tower: States([each], places) for tower, each in parts.items()})


def text_of(data, guid):
    return clean_text(decode_text((Path(data) / f"{guid}.txt").read_bytes())[0])


def whole_clip(folder, data, text_layers, vision_layers):
    """Return a whole Hugging Face CLIP, its texts padded to 77 tokens."""
    from mmcli.featurize.pairs.image import decode_image
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval().requires_grad_(False).double()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text, vision = model.text_model, model.vision_model
    trained = [*text.encoder.layers[len(text.encoder.layers) - text_layers :]]
    trained += [text.final_layer_norm] if text_layers else []
    trained += [*vision.encoder.layers[len(vision.encoder.layers) - vision_layers :]]
    trained += [vision.post_layernorm] if vision_layers else []
    for module in trained:
        module.requires_grad_(True)

    def embed(guids):
        texts = [text_of(data, guid) for guid in guids]
        tokens = tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=77)
        images = [decode_image((Path(data) / f"{guid}.jpg").read_bytes()) for guid in guids]
        pixels = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
        image = model.get_image_features(pixel_values=pixels.double()).pooler_output
        return Batch(image, model.get_text_features(**tokens).pooler_output)

    unfrozen = {name: each for name, each in model.named_parameters() if each.requires_grad}
    layers = {"text": (text.encoder.layers, text_layers), "image": (vision.encoder.layers, vision_layers)}
    first = {tower: each[len(each) - count] for tower, (each, count) in layers.items() if count}
    return Whole(embed, unfrozen, first, model)


def whole_offline(data, text_layers, vision_layers):
    """Return both offline encoders, texts padded to the longest of them."""
    from mmcli.featurize import open_backbone
    from mmcli.featurize.pairs.image import decode_image

    encoder = open_backbone("offline").load("cpu", "float32", None)
    text, image = encoder.text_model.requires_grad_(False).double(), encoder.image_model.requires_grad_(False)
    projections = encoder.image_projection.double(), encoder.text_projection.double()
    unfrozen = {}
    layers = text.encoder.layer
    for number in range(len(layers) - text_layers, len(layers)):
        for name, each in layers[number].named_parameters():
            unfrozen[f"text_model.encoder.layer.{number}.{name}"] = each.requires_grad_(True)
    for number in range(len(image._blocks) + 1 - vision_layers, len(image._blocks)):
        for name, each in image._blocks[number].named_parameters():
            unfrozen[f"image_model._blocks.{number}.{name}"] = each.requires_grad_(True)
    if vision_layers:
        for name in ("_conv_head.weight", "_bn1.weight", "_bn1.bias"):
            unfrozen[f"image_model.{name}"] = image.get_parameter(name).requires_grad_(True)
    first = {"text": layers[len(layers) - text_layers]} if text_layers else {}
    if vision_layers:
        # Convolutions are slow in float64. So images are float32 up to the first unfrozen layer, and one at a time.
        upper = [*image._blocks, image._conv_head][-vision_layers:]
        for module in (*upper, image._bn1):
            module.double()
        first["image"] = upper[0]
        upper[0].register_forward_pre_hook(lambda _, args: (args[0].double(),))

    def embed(guids):
        tokens = encoder.tokenizer([text_of(data, guid) for guid in guids], return_tensors="pt", padding=True)
        states = text(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(2)
        pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
        images = [decode_image((Path(data) / f"{guid}.jpg").read_bytes()) for guid in guids]
        pixels = [torch.from_numpy(encoder.prepare_image(each))[None] for each in images]
        features = torch.cat([image.extract_features(each).double().mean(dim=(2, 3)) for each in pixels])
        return Batch(features @ projections[0], pooled @ projections[1])

    return Whole(embed, unfrozen, first)
