"""Where the parts of each dual encoder of transformers are.

Every model with ``get_image_features`` and ``get_text_features`` can be featurized. Stage 2 also cuts a tower below its
last layers, so it needs a model that is listed here.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

PooledToken = Literal["end", "highest", "highest if the end token is 2"]


@dataclass(frozen=True)
class Tower:
    """The parts of one tower.

    Attributes
    ----------
    module
        Name of the tower in the model. It has the children ``embeddings`` and ``encoder``.
    layers
        Name of the list of layers in the encoder. None: the tower is built differently and cannot be cut.
    norm
        Name of the last norm in the tower, which stage 2 trains together with the layers.
    norm_before
        Name of a norm between embeddings and layers.
    projection
        Name of the projection in the model.
    pools_one_position
        Whether ``one_position.at_position`` computes the tower's last layer.
    """

    module: str
    layers: str | None = None
    norm: str | None = None
    norm_before: str | None = None
    projection: str | None = None
    pools_one_position: bool = False


@dataclass(frozen=True)
class Architecture:
    """The towers of a model, and how it treats texts.

    Attributes
    ----------
    pads_texts
        Whether texts are padded to the full length without a mask, as in SigLIP's training.
    pooled_token
        The token at which the text tower pools, if it pools at a token: the end token, or the highest id in the text.
        (CLIP's old configurations call the end token 2; CLIP then takes the highest id.)
    projects_each_position
        Whether the model projects every position; the first is the embedding.
    """

    image: Tower
    text: Tower
    pads_texts: bool = False
    pooled_token: PooledToken | None = None
    projects_each_position: bool = False

    def tower(self, side: str) -> Tower:
        """Return the ``image`` or the ``text`` tower."""
        return self.image if side == "image" else self.text


_IMAGE = Tower("vision_model", "layers", "post_layernorm", projection="visual_projection")
_CLIP_IMAGE = replace(_IMAGE, norm_before="pre_layrnorm")
_CLIP_TEXT = Tower("text_model", "layers", "final_layer_norm", projection="text_projection")
_BERT_TEXT = Tower("text_model", "layer", projection="text_projection")  # BERT's norms are inside its layers
_UNCUT_IMAGE = Tower("vision_model", projection="visual_projection")
_SIGLIP = Architecture(
    replace(_IMAGE, projection=None), Tower("text_model", "layers", "final_layer_norm"), pads_texts=True
)
_OWL = Architecture(_UNCUT_IMAGE, _CLIP_TEXT, pooled_token="highest")
_UNKNOWN = Architecture(Tower("vision_model"), Tower("text_model"))

# By model_type in config.json.
ARCHITECTURES = {
    "aimv2": Architecture(replace(_IMAGE, norm="rms_norm"), replace(_CLIP_TEXT, norm="rms_norm"), pooled_token="end"),
    "align": Architecture(Tower("vision_model"), _BERT_TEXT),
    "altclip": Architecture(_CLIP_IMAGE, Tower("text_model", projection="text_projection")),
    "blip": Architecture(_IMAGE, _BERT_TEXT),
    "chinese_clip": Architecture(replace(_CLIP_IMAGE, pools_one_position=True), _BERT_TEXT),
    "clip": Architecture(
        replace(_CLIP_IMAGE, pools_one_position=True),
        replace(_CLIP_TEXT, pools_one_position=True),
        pooled_token="highest if the end token is 2",
    ),
    "clipseg": Architecture(_CLIP_IMAGE, _CLIP_TEXT, pooled_token="highest if the end token is 2"),
    "flava": Architecture(
        Tower("image_model", projection="image_projection"),
        Tower("text_model", "layer", "layernorm", projection="text_projection"),
        projects_each_position=True,
    ),
    "groupvit": Architecture(_UNCUT_IMAGE, _CLIP_TEXT, pooled_token="highest if the end token is 2"),
    "metaclip_2": Architecture(_CLIP_IMAGE, _CLIP_TEXT, pooled_token="end"),
    "owlv2": _OWL,
    "owlvit": _OWL,
    "siglip": _SIGLIP,
    "siglip2": _SIGLIP,
    "tipsv2": Architecture(
        Tower("vision_model", "layer", "layernorm"), Tower("text_model", "layers", "final_layer_norm")
    ),
    "vision-text-dual-encoder": Architecture(_UNCUT_IMAGE, _BERT_TEXT),
}


def architecture_of(model: Any) -> Architecture:
    """Return the architecture of a transformers model; one without layers if the model is not listed."""
    return ARCHITECTURES.get(model.config.model_type, _UNKNOWN)
