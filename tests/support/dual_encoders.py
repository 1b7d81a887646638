"""Small dual encoders of every kind in transformers, as folders that ``save_pretrained`` wrote."""

import json

import torch
import transformers
from conftest import WORDS, byte_vocabulary
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {"image_size": 64, "patch_size": 16, **SMALL}
BYTES = byte_vocabulary()
START, END = BYTES["<|startoftext|>"], BYTES["<|endoftext|>"]
CLIP_TEXT = {"vocab_size": len(BYTES), "bos_token_id": START, "eos_token_id": END, "pad_token_id": END, **SMALL}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(chr, range(33, 127))]
PIECES += [f"##{chr(code)}" for code in range(33, 127)]
BERT_TEXT = {"vocab_size": len(PIECES), "pad_token_id": 0, "max_position_embeddings": 80, **SMALL}
STAGES = {"depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]}

# kind: (tokenizer, image processor, text_config, vision_config, other entries of the configuration)
KINDS = {
    "CLIP": ("clip", "CLIPImageProcessor", CLIP_TEXT, VISION, {"projection_dim": 24}),
    "Siglip": ("bert", "SiglipImageProcessor", BERT_TEXT | {"max_position_embeddings": 24}, VISION, {}),
    "Siglip2": (
        "clip",
        "Siglip2ImageProcessor",
        CLIP_TEXT | {"vocab_size": 520},
        {**SMALL, "patch_size": 16, "num_patches": 16},
        {},
    ),
    "ChineseCLIP": ("bert", "ChineseCLIPImageProcessor", BERT_TEXT, VISION, {"projection_dim": 24}),
    "AltCLIP": (
        "roberta",
        "CLIPImageProcessor",
        BERT_TEXT | {"pad_token_id": 1, "project_dim": 24},
        VISION,
        {"projection_dim": 24},
    ),
    "Align": (
        "bert",
        "EfficientNetImageProcessor",
        BERT_TEXT,
        {
            "image_size": 600,
            "width_coefficient": 0.2,
            "depth_coefficient": 0.2,
            "hidden_dim": 160,
            "initializer_range": 0.5,
        },
        {"projection_dim": 64},
    ),
    "GroupViT": (
        "clip",
        "CLIPImageProcessor",
        CLIP_TEXT,
        VISION | STAGES,
        {"projection_dim": 24, "projection_intermediate_dim": 40},
    ),
    "Flava": ("bert", "FlavaImageProcessor", BERT_TEXT, None, {"projection_dim": 24}),
    "CLIPSeg": ("clip", "ViTImageProcessor", CLIP_TEXT, VISION, {"projection_dim": 24, "extract_layers": [0, 1]}),
    "Blip": ("bert", "BlipImageProcessor", BERT_TEXT | {"encoder_hidden_size": 32}, VISION, {"projection_dim": 24}),
    "OwlViT": (
        "clip",
        "OwlViTImageProcessor",
        CLIP_TEXT | {"max_position_embeddings": 16},
        VISION,
        {"projection_dim": 24},
    ),
    "Owlv2": (
        "clip",
        "OwlViTImageProcessor",
        CLIP_TEXT | {"max_position_embeddings": 16},
        VISION,
        {"projection_dim": 24},
    ),
    "MetaClip2": (  # its end token has the id 2, as in XLM-R
        "roberta",
        "CLIPImageProcessor",
        BERT_TEXT | {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
        VISION,
        {"projection_dim": 24},
    ),
    "Aimv2": ("clip", "CLIPImageProcessor", CLIP_TEXT, VISION, {"projection_dim": 24}),
    "XCLIP": ("clip", "CLIPImageProcessor", CLIP_TEXT, VISION, {"projection_dim": 24}),
    "Tipsv2": ("bert", "ViTImageProcessor", BERT_TEXT, VISION, {}),
    "VisionTextDualEncoder": ("bert", "ViTImageProcessor", BERT_TEXT, VISION, {"projection_dim": 24}),
}


def make(kind, folder, seed=0):
    """Write a folder with random weights; return it."""
    tokenizer, processor, text, vision, more = KINDS[kind]
    config_class = getattr(transformers, f"{kind}Config")
    if kind == "Flava":
        sides = {"image_config": VISION, "multimodal_config": SMALL}
        config = config_class(text_config=text, **sides, **more)
    elif kind == "VisionTextDualEncoder":
        sides = transformers.ViTConfig(**vision), transformers.BertConfig(**text)
        config = config_class.from_vision_text_configs(*sides, **more)
    else:
        config = config_class(text_config=text, vision_config=vision, **more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}Model")(config)
    model.eval().save_pretrained(folder)
    tokenizer_of(tokenizer).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    crops = processor in ("CLIPImageProcessor", "ChineseCLIPImageProcessor")
    sizes = {"size": {"shortest_edge": 64}, "crop_size": size} if crops else {"size": size, "crop_size": size}
    if processor == "Siglip2ImageProcessor":
        sizes = {"patch_size": 16, "max_num_patches": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": processor, **sizes}))
    return folder


def tokenizer_of(kind):
    if kind == "clip":
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        return transformers.CLIPTokenizer(
            vocab=BYTES, merges=[], pad_token="<|endoftext|>", model_max_length=77, **special
        )
    pieces = PIECES if kind == "bert" else ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *PIECES[5:]]
    unknown, start, end = ("[UNK]", "[CLS]", "[SEP]") if kind == "bert" else ("<unk>", "<s>", "</s>")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, vocabulary[token]) for token in (start, end)]
    backend.post_processor = processors.TemplateProcessing(f"{start} $A {end}", f"{start} $A {end} $B {end}", ends)
    special = {
        "unk_token": unknown,
        "pad_token": pieces[0 if kind == "bert" else 1],
        "cls_token": start,
        "sep_token": end,
    }
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=77, **special)
