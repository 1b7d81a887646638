"""What is loaded is what was asked for: weights, tokenizer and processor of one model, all of it hashed."""

import hashlib
import json
import shutil

import pytest
import torch
from mmcli.cache import BackboneError
from mmcli.featurize import open_backbone
from mmcli.featurize.backbones.huggingface import is_whole
from safetensors.torch import load_file, save_file
from tolerances import close_rows
from transformers import AutoModel, AutoTokenizer


@pytest.fixture
def folder(tiny_clip, tmp_path):
    """A copy of the small CLIP, to be spoilt."""
    return shutil.copytree(tiny_clip, tmp_path / "clip")


def load(folder):
    return open_backbone(str(folder)).load("cpu", "float32", None)


def assert_same(*folders):
    first, second = (load(folder).encode_texts([[512, 5, 513]]).pooled for folder in folders)
    close_rows(first, second)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shard(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """Put the weights into two files, and an index beside them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(weights.items())[start::2]) for start in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name, metadata={"format": "pt"})
    places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


class TestWeights:
    def test_names_with_a_prefix_are_refused(self, folder):
        change_weights(folder, lambda weights: {f"module.{name}": each for name, each in weights.items()})
        said = r"do not fit its config.json, which .*: 109 of 110 weights are missing, such as text_model.*; "
        with pytest.raises(BackboneError, match=said + r"110 in the file do not belong .*, such as module\."):
            load(folder)

    def test_a_layer_that_the_file_lacks_is_refused(self, folder):
        change_json(folder / "config.json", lambda config: config["text_config"].update(num_hidden_layers=4))
        with pytest.raises(
            BackboneError, match=r"16 of 126 weights are missing, such as text_model.encoder.layers.3\."
        ):
            load(folder)

    def test_a_layer_that_the_configuration_leaves_out_is_refused(self, folder):
        change_json(folder / "config.json", lambda config: config["text_config"].update(num_hidden_layers=2))
        with pytest.raises(
            BackboneError, match=r"16 in the file do not belong to this model, such as text_model.*layers.2\."
        ):
            load(folder)

    def test_another_shape_is_refused(self, folder):
        change_json(folder / "config.json", lambda config: config.update(projection_dim=20))
        with pytest.raises(
            BackboneError, match=r"2 have the wrong shape, such as .*: \(24, 32\) in the file, \(20, 32\) in config"
        ):
            load(folder)

    def test_an_adapter_beside_a_layer_is_refused(self, folder):
        name = "text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
        change_weights(folder, lambda weights: weights | {name: torch.ones(4, 32)})
        with pytest.raises(BackboneError, match=f"1 in the file do not belong to this model, such as {name}"):
            load(folder)

    @pytest.mark.parametrize("name", ["text_model.embeddings.position_ids", "decoder.film.weight", "logit_bias"])
    def test_what_no_tower_uses_may_be_in_the_file(self, folder, tiny_clip, name):
        change_weights(folder, lambda weights: weights | {name: torch.ones(1, 77)})
        assert_same(folder, tiny_clip)

    def test_the_scale_of_the_similarity_may_be_missing(self, folder):
        change_weights(folder, lambda weights: {name: each for name, each in weights.items() if "." in name})
        load(folder)

    def test_weights_that_are_not_finite_are_refused(self, folder):
        change_weights(folder, lambda weights: weights | {"visual_projection.weight": torch.full((24, 32), torch.nan)})
        with pytest.raises(BackboneError, match=r"the image embeddings of the CLIPModel in .* are not finite vectors"):
            load(folder)


class TestTokenizer:
    def test_a_folder_without_tokenizer_files_is_refused(self, folder):
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (folder / name).unlink()
        with pytest.raises(
            BackboneError, match=r"tokenizer in .* does not belong to the model: it has \d+ tokens .* takes 514"
        ):
            load(folder)

    @pytest.mark.parametrize("tokens", [300, 515])
    def test_a_tokenizer_of_another_model_is_refused(self, folder, tokens):
        def resize(vocabulary):
            for number in range(tokens, 514):
                del vocabulary[next(name for name, each in vocabulary.items() if each == number)]
            if tokens > 514:
                vocabulary["more</w>"] = 514

        change_json(folder / "vocab.json", resize)
        with pytest.raises(BackboneError, match=r"does not belong to the model: it has \d+ tokens \(highest id \d+\)"):
            load(folder)

    def test_a_vocabulary_that_was_rounded_up_is_fine(self, folder):
        def pad(weights):
            name = "text_model.embeddings.token_embedding.weight"
            return weights | {name: torch.cat([weights[name], torch.zeros(62, 32)])}

        change_weights(folder, pad)
        change_json(folder / "config.json", lambda config: config["text_config"].update(vocab_size=576))
        load(folder)

    @pytest.mark.parametrize("end", [7, 2])
    def test_an_end_token_that_the_model_does_not_look_for_is_refused(self, folder, end):
        change_json(folder / "config.json", lambda config: config["text_config"].update(eos_token_id=end))
        if end == 2:  # the model takes the highest id, which the tokenizer puts first
            swap = {"bos_token": "<|endoftext|>", "eos_token": "<|startoftext|>"}
            change_json(folder / "tokenizer_config.json", lambda config: config.update(swap))
        with pytest.raises(
            BackboneError, match=r"pools at (token 7|the highest token id), which must be the last .* 51[23]\]"
        ):
            load(folder)

    def test_the_highest_id_is_the_end_of_old_configurations(self, folder, tiny_clip):
        change_json(folder / "config.json", lambda config: config["text_config"].update(eos_token_id=2))
        assert_same(folder, tiny_clip)

    def test_no_token_for_padding_is_refused(self, folder):
        change_json(folder / "tokenizer_config.json", lambda config: config.update(pad_token=None))
        with pytest.raises(BackboneError, match="has no padding token"):
            load(folder)

    def test_a_tokenizer_that_knows_no_word_is_refused(self, folder):
        vocabulary = {f"{name}é" if number < 512 else name: number for name, number in vocabulary_of(folder).items()}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        with pytest.raises(BackboneError, match=r"tokenizer in .* does not belong to|texts the same tokens"):
            load(folder)


def vocabulary_of(folder):
    return json.loads((folder / "vocab.json").read_text())


class TestProcessor:
    def test_pictures_of_another_size_are_refused(self, folder):
        path = folder / "preprocessor_config.json"
        path.write_text(path.read_text().replace("64", "128"))
        with pytest.raises(BackboneError, match="it gives images of 128 x 128 pixels, but the model takes 64 x 64"):
            load(folder)

    def test_pictures_of_many_sizes_are_refused(self, folder):
        change_json(folder / "preprocessor_config.json", lambda config: config.update(do_center_crop=False))
        with pytest.raises(
            BackboneError, match=r"gives a wide image the shape \(3, 64, 96\) and a tall image \(3, 96, 64\)"
        ):
            load(folder)

    def test_channels_that_the_model_does_not_take_are_refused(self, folder):
        change_json(folder / "config.json", lambda config: config["vision_config"].update(num_channels=1))
        name = "vision_model.embeddings.patch_embedding.weight"
        change_weights(folder, lambda weights: weights | {name: weights[name][:, :1].contiguous()})
        with pytest.raises(BackboneError, match=r"the CLIPModel in .* cannot encode the output of its own processor"):
            load(folder)


class TestCode:
    @pytest.mark.parametrize("known", [False, True])
    def test_no_code_of_the_folder_runs(self, folder, tmp_path, monkeypatch, known):
        ran, questions = tmp_path / "ran", []
        monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
        (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
        auto = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoImageProcessor": "evil.P"}

        def poison(content):
            content["auto_map"] = auto | {"AutoTokenizer": ["evil.T", "evil.T"]}
            if not known:
                content |= {"model_type": "evil", "image_processor_type": "Evil", "tokenizer_class": "Evil"}

        for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
            change_json(folder / name, poison)
        if known:  # what transformers has itself is taken from there
            load(folder)
        else:
            with pytest.raises(BackboneError, match="cannot be loaded as a model"):
                load(folder)
        assert not ran.exists()
        assert not questions


class TestOnlyWhatIsHashed:
    def test_the_identity_of_a_plain_folder(self, tiny_clip):
        names = ["config.json", "preprocessor_config.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
        names.append("model.safetensors")
        hashes = {name: hashlib.sha256((tiny_clip / name).read_bytes()).hexdigest() for name in names}
        whole = {"kind": "huggingface", "files": hashes, "pooling": "projected", "max_tokens": 77}
        assert open_backbone(str(tiny_clip)).identity() == whole

    def test_shards_are_hashed_and_loaded(self, folder, tiny_clip):
        shard(folder)
        assert {name for name in open_backbone(str(folder)).identity()["files"] if name.startswith("model")} == {
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        }
        assert_same(folder, tiny_clip)

    @pytest.mark.parametrize("name", ["elsewhere.safetensors", "../model-00002-of-00002.safetensors"])
    def test_an_index_that_names_other_files_is_refused(self, folder, name):
        shard(folder, ("model-00001-of-00002.safetensors", name))
        for use in (open_backbone(str(folder)).identity, lambda: load(folder)):
            with pytest.raises(BackboneError, match=f"lacks 1 weight files, such as {name!r}"):
                use()

    @pytest.mark.parametrize("content", ["", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["b"]}}'])
    def test_an_index_that_is_none_is_refused(self, folder, content):
        shard(folder)
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(BackboneError, match=r"is not an index of weights|lacks 1 weight files"):
            open_backbone(str(folder)).identity()

    def test_weights_that_the_configuration_names_are_not_loaded(self, folder):
        shutil.move(folder / "model.safetensors", folder / "elsewhere.safetensors")
        shutil.copy(folder / "elsewhere.safetensors", folder / "model.safetensors")
        change_json(folder / "config.json", lambda config: config.update(transformers_weights="elsewhere.safetensors"))
        with pytest.raises(BackboneError, match="cannot be loaded as a model"):
            load(folder)

    def test_a_tokenizer_of_another_name_is_not_loaded(self, folder):
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        other = (folder / "tokenizer.json").read_text().replace('"g"', '"§"').replace('"h"', '"g"')
        (folder / "tokenizer.5.0.0.json").write_text(other)
        named = {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.5.0.0.json"]}
        change_json(folder / "tokenizer_config.json", lambda config: config.update(named))
        with pytest.raises(BackboneError, match="tokenizer"):
            load(folder)

    def test_an_adapter_is_refused(self, folder):
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(BackboneError, match=r"holds an adapter .* merge it into the model"):
            open_backbone(str(folder)).identity()

    def test_a_lone_sentencepiece_model_is_hashed(self, folder):
        (folder / "tokenizer.model").write_bytes(b"pieces")
        assert "tokenizer.model" in open_backbone(str(folder)).identity()["files"]
        (folder / "tokenizer.json").write_text("{}")
        assert "tokenizer.model" not in open_backbone(str(folder)).identity()["files"]

    def test_nothing_is_left_in_the_temporary_folder(self, folder, tmp_path, monkeypatch):
        import tempfile

        (tmp_path / "own").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "own"))
        load(folder)
        (folder / "config.json").write_text("{}")
        with pytest.raises(BackboneError, match=str(folder)) as refused:
            load(folder)
        assert str(tmp_path / "own") not in str(refused.value)
        assert not list((tmp_path / "own").iterdir())


class TestCutDownloads:
    def test_a_model_is_whole_with_all_its_shards(self, folder):
        assert is_whole(folder)
        shard(folder)
        assert is_whole(folder)
        (folder / "model-00002-of-00002.safetensors").unlink()
        assert not is_whole(folder)
        (folder / "model.safetensors.index.json").write_text('{"weight_map"')
        assert not is_whole(folder)
        (folder / "model.safetensors.index.json").unlink()
        assert not is_whole(folder)

    def test_what_is_missing_is_fetched_again(self, folder, monkeypatch):
        import huggingface_hub

        shard(folder)
        second = folder / "model-00002-of-00002.safetensors"
        kept = second.read_bytes()
        second.unlink()

        def fetch(*arguments, local_files_only=False, **options):
            if not local_files_only:
                assert second.name in options["allow_patterns"]
                second.write_bytes(kept)
            return str(folder)

        siblings = [
            type("File", (), {"rfilename": name}) for name in [*(each.name for each in folder.iterdir()), second.name]
        ]
        info = type("Info", (), {"siblings": siblings, "sha": "0" * 40})
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **o: info)
        backbone = open_backbone("someone/some-clip")
        assert second.exists()
        theirs = (
            AutoModel.from_pretrained(folder).get_text_features(input_ids=torch.tensor([[512, 5, 513]])).pooler_output
        )
        ours = backbone.load("cpu", "float32", None).encode_texts([[512, 5, 513]]).pooled
        close_rows(ours, theirs.detach())
