"""Pairs per second from files to embeddings, compared in one run with what people write or install instead.

    pip install -e '.[offline,benchmarks]'
    python benchmarks/featurize.py DATA CLIP_FOLDER

Ours is the whole process of `mmcli featurize` on every pair of DATA. Each peer is a process that loads the model,
encodes one batch as a warm-up, and is timed from files to embeddings on a sample of DATA in batches of 64. All of them
read and clean the text in the same way. After each peer, ours is timed on the same sample in the same way, so each
ratio compares neighbours in time.

`loop`: CLIPModel and CLIPProcessor as in their documentation, float32, texts padded to 77. `sentence-transformers`: its
`encode` for images and for texts. `onnxruntime`: both towers exported, float32, texts padded to the longest in a batch.
`gemm`: a bound. It measures the rate of this machine's bfloat16 matrix products in the sizes that occur, and counts the
operations that the distinct images and texts need without padding, the last layer only at the position that is pooled.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from common import MMCLI, spread, step

BATCH = 64


def read(data, count):
    """Return image paths and cleaned texts of ``count`` pairs, evenly spread."""
    from mmcli.featurize import Dataset
    from mmcli.featurize.pairs.hashing import load_text

    pairs = Dataset.open(data).pairs
    pairs = pairs[:: max(1, len(pairs) // count)][:count]
    return [pair.image for pair in pairs], [load_text(pair.read_text(), True)[0] for pair in pairs]


def loop(folder):
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)

    def encode(images, texts):
        pictures = [Image.open(path).convert("RGB") for path in images]
        inputs = processor(
            text=texts, images=pictures, return_tensors="pt", padding="max_length", truncation=True, max_length=77
        )
        with torch.no_grad():
            image = model.get_image_features(pixel_values=inputs["pixel_values"])
            text = model.get_text_features(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return image.pooler_output.numpy(), text.pooler_output.numpy()

    return encode


def sentence_transformers(folder):
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")

    def encode(images, texts):
        pictures = [Image.open(path).convert("RGB") for path in images]
        return model.encode(pictures, batch_size=BATCH), model.encode(texts, batch_size=BATCH)

    return encode


def onnxruntime(folder):
    import onnxruntime as ort
    from PIL import Image
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as made:
        sessions = []
        for path in export(folder, Path(made)):
            sessions.append(ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]))
    vision, text_tower = sessions

    def encode(images, texts):
        pictures = [Image.open(path).convert("RGB") for path in images]
        inputs = processor(
            text=texts, images=pictures, return_tensors="np", padding="longest", truncation=True, max_length=77
        )
        (image,) = vision.run(None, {"pixel_values": inputs["pixel_values"]})
        fed = {name: inputs[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        (text,) = text_tower.run(None, fed)
        return image, text

    return encode


def export(folder, made):
    """Write both towers as ONNX."""
    import torch
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder, attn_implementation="eager").eval()

    class Vision(torch.nn.Module):
        def forward(self, pixel_values):
            return model.get_image_features(pixel_values=pixel_values).pooler_output

    class Text(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return model.get_text_features(input_ids, attention_mask=attention_mask).pooler_output

    ids = torch.full((2, 9), 49407)
    ids[:, :5] = 320
    for name, tower, inputs, axes in (
        (
            "vision",
            Vision(),
            {"pixel_values": torch.zeros(2, 3, *[model.config.vision_config.image_size] * 2)},
            {0: "batch"},
        ),
        ("text", Text(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {0: "batch", 1: "length"}),
    ):
        path = made / f"{name}.onnx"
        dims = {number: torch.export.Dim(f"{name}_{axis}") for number, axis in axes.items()}
        program = torch.onnx.export(tower, tuple(inputs.values()), dynamo=True, dynamic_shapes=[dims] * len(inputs))
        program.save(str(path))
        yield path


def ours(folder):
    from mmcli.featurize import open_backbone
    from mmcli.featurize.backbones.opening import choose_dtype
    from mmcli.featurize.encode import encode_blocks
    from mmcli.featurize.identity import EncodeOptions
    from mmcli.featurize.pairs.pair import Pair

    encoder = open_backbone(str(folder)).load("cpu", choose_dtype("auto", "cpu"), None)

    def encode(images, texts):
        pairs = [Pair(image, image, text=text) for image, text in zip(images, texts, strict=True)]
        ((block, _),) = encode_blocks([pairs], encoder, EncodeOptions())
        return block.columns["image"], block.columns["text"]

    encode.in_one_go = True
    return encode


PEERS = {"loop": loop, "sentence-transformers": sentence_transformers, "onnxruntime": onnxruntime}


def timed(name, data, folder, count):
    """Time one of them on a sample; print pairs per second, and keep the embeddings to compare."""
    encode = (PEERS | {"ours": ours})[name](folder)
    images, texts = read(data, count)
    encode(images[:BATCH], texts[:BATCH])
    size = count if hasattr(encode, "in_one_go") else BATCH
    started = time.perf_counter()
    found = [encode(images[start : start + size], texts[start : start + size]) for start in range(0, count, size)]
    seconds = time.perf_counter() - started
    image, text = (np.concatenate(each) for each in zip(*found, strict=True))
    return {"rate": count / seconds, "image": image.tolist(), "text": text.tolist()}


def gemm(data, folder):
    """Return seconds that the operations needed for every pair of ``data`` take at this machine's bfloat16 rate."""
    import torch
    from mmcli.featurize import Dataset, open_backbone
    from mmcli.featurize.pairs.hashing import Reject, hash_pair
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    hashed = [hash_pair(pair, ("image", "text"), True) for pair in Dataset.open(data).pairs]
    hashed = [pair for pair in hashed if not isinstance(pair, Reject)]
    images = len({pair.digests["row/image_sha256"] for pair in hashed})
    texts = sorted({pair.text for pair in hashed})
    ids, _ = open_backbone(str(folder)).load("cpu", "float32", None).tokenize(texts)
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    operations = images * (tower(vision, patches + 1) + 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size)
    operations += sum(tower(text, len(row)) for row in ids)
    operations += 2 * config.projection_dim * (images * vision.hidden_size + len(texts) * text.hidden_size)
    rates = []
    with torch.inference_mode():
        for inner, outer in ((768, 3072), (3072, 768), (768, 768)):
            rows = torch.randn(3200, inner).bfloat16()
            layer = torch.nn.Linear(inner, outer).bfloat16()
            for _ in range(3):
                layer(rows)
            each, started = [], time.perf_counter()
            while time.perf_counter() - started < 3:
                begun = time.perf_counter()
                layer(rows)
                each.append(2 * 3200 * inner * outer / (time.perf_counter() - begun))
            rates.append(statistics.median(each))
    return {
        "seconds": operations / max(rates),
        "gflops": max(rates) / 1e9,
        "pairs": len(hashed),
        "operations": operations,
    }


def tower(config, length):
    """Return the operations of a CLIP tower on one row: all layers but the last, and of that what is pooled."""
    width, inner = config.hidden_size, config.intermediate_size
    per_token = 2 * (4 * width**2 + 2 * width * inner) + 4 * length * width
    return (config.num_hidden_layers - 1) * length * per_token + 2 * (4 * width**2 + 2 * width * inner)


def cosine(one, two):
    """Return the least cosine of two lists of embeddings."""
    left, right = np.array(one), np.array(two)
    return ((left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)).min()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path, help="of a CLIP model; `offline` times the offline backbone alone")
    parser.add_argument("--sample", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--step", choices=[*PEERS, "ours", "gemm"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "gemm":
        print(json.dumps(gemm(args.data, args.folder)))
        return
    if args.step:
        print(json.dumps(timed(args.step, args.data, args.folder, args.sample)))
        return
    whole = []
    bounds = []
    for _ in range(args.repeats):
        if str(args.folder) != "offline":
            bounds.append(step(__file__, args.data, args.folder, "--step", "gemm")[1])
        with tempfile.TemporaryDirectory() as made:
            started = time.perf_counter()
            command = [MMCLI, "featurize", args.data, "--backbone", args.folder, "--out", Path(made) / "f.h5", "--json"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            whole.append(json.loads(done.stdout)["rows"] / (time.perf_counter() - started))
    print(
        f"mmcli featurize, whole process, {json.loads(done.stdout)['rows']} pairs: {spread(whole, 'pairs/s')}",
        flush=True,
    )
    if str(args.folder) == "offline":
        return
    rates = [bound["pairs"] / bound["seconds"] for bound in bounds]
    shares = [100 * mine / bound for mine, bound in zip(whole, rates, strict=True)]
    print(
        f"bfloat16 matrix products at {spread([bound['gflops'] for bound in bounds], 'GFLOP/s')}, "
        f"{bounds[0]['operations'] / bounds[0]['pairs'] / 1e9:.2f} GFLOP needed per pair: at most "
        f"{spread(rates, 'pairs/s')}; ours is {spread(shares, '%')} of it",
        flush=True,
    )
    for peer in args.peers:
        theirs, mine, ratios = [], [], []
        for _ in range(args.repeats):
            found, own = (
                step(__file__, args.data, args.folder, "--step", each, "--sample", args.sample)[1]
                for each in (peer, "ours")
            )
            theirs.append(found["rate"])
            mine.append(own["rate"])
            ratios.append(own["rate"] / found["rate"])
            least = min(cosine(found[side], own[side]) for side in ("image", "text"))
        print(
            f"{peer}: {spread(theirs, 'pairs/s')}, ours on the same {args.sample} pairs {spread(mine, 'pairs/s')}: "
            f"{spread(ratios, 'times')}; least cosine of the embeddings {least:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
