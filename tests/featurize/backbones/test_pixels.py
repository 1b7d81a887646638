"""Pictures are prepared as transformers' own processors prepare them, to the bit."""

import numpy as np
import pytest
from mmcli.cache import BackboneError
from mmcli.featurize.backbones.tensors import make_preparer
from PIL import Image
from transformers import ChineseCLIPImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil

PROCESSORS = {
    "clip": CLIPImageProcessorPil(),
    "clip 336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    "crop smaller": CLIPImageProcessorPil(size={"shortest_edge": 256}),
    "bilinear": CLIPImageProcessorPil(resample=2, image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.3]),
    "siglip": SiglipImageProcessorPil(),
    "chinese clip": ChineseCLIPImageProcessorPil(),
}


def theirs(processor, image, **settings):
    return processor(image, return_tensors="np", input_data_format="channels_last", **settings)["pixel_values"][0]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(640, 480), (333, 500), (224, 224), (31, 7), (3, 3), (1, 90)])
def test_the_same_to_the_bit(name, size):
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    prepare = make_preparer(PROCESSORS[name], None)
    assert prepare.table is not None
    found = prepare(Image.fromarray(noise))
    assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)
    assert np.array_equal(found, theirs(PROCESSORS[name], Image.fromarray(noise)))


def test_with_another_short_side():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    expected = theirs(PROCESSORS["clip"], noise, size={"shortest_edge": 256})
    prepare = make_preparer(PROCESSORS["clip"], 256)
    assert prepare.table is not None
    assert np.array_equal(prepare(noise), expected)
    with pytest.raises(BackboneError, match="less than the model's crop of 224 pixels"):
        make_preparer(PROCESSORS["clip"], 200)


def test_a_processor_that_does_something_else_is_used_itself():
    class Negative(CLIPImageProcessorPil):
        def center_crop(self, image, size, **settings):
            return 255 - super().center_crop(image, size, **settings)

    processor = Negative()
    prepare = make_preparer(processor, None)
    assert prepare.table is None
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    assert np.array_equal(prepare(noise), theirs(processor, noise))
    assert not np.array_equal(prepare(noise), theirs(PROCESSORS["clip"], noise))
