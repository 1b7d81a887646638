"""Each fusion against its formula, written out with NumPy."""

import numpy as np
import pytest
import torch
from mmcli.cache import Features, MmcliError
from mmcli.cache.features import Tokens
from mmcli.heads import FUSIONS, Ensemble, Head, Recipe, Rows
from mmcli.heads.model.fusions import Sizes
from mmcli.heads.model.head import VIT_B32, describe_fusions, sizes_of
from mmcli.heads.model.inputs import Batch, TokenBatch
from mmcli.heads.training.loop import FitOptions, _Training
from tolerances import close_rows

N, DIM, PLACES, IMAGE_WIDTH, TEXT_WIDTH = 30, 8, 5, 10, 6


def tokens(n=N, seed=0, lengths=None):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 7, n) if lengths is None else np.array(lengths)
    return Tokens(
        random.standard_normal((n, PLACES, IMAGE_WIDTH)).astype(np.float16),
        random.standard_normal((lengths.sum(), TEXT_WIDTH)).astype(np.float16),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.arange(n),
    )


def features(n=N, seed=0, with_tokens=True):
    random = np.random.default_rng(seed)
    image, text = random.standard_normal((2, n, DIM)).astype(np.float32)
    return Features(image, text, tokens(n, seed) if with_tokens else None)


def made(name, seen, **settings):
    """Return a head of one fusion, every weight random, in evaluation mode, and the batch of all rows."""
    torch.manual_seed(0)
    head = Head(sizes_of(seen), 3, Recipe(fusion=name, **settings))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head.learn_inputs(seen)
    states = None if seen.tokens is None else TokenBatch(*map(torch.from_numpy, seen.tokens.padded()))
    return head.eval(), Batch(torch.from_numpy(seen.image), torch.from_numpy(seen.text), states)


def standardised(rows):
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (unit - unit.mean(axis=0)) / unit.std(axis=0)


def weights(module):
    return (
        module.weight.detach().double().numpy(),
        None if module.bias is None else module.bias.detach().double().numpy(),
    )


def attended(head, states):
    """Cross-attention, one row, one head and one text token at a time."""
    attention = head.fusion.attention
    flat = np.concatenate(
        [states.text[start:stop] for start, stop in zip(states.offsets, states.offsets[1:], strict=False)]
    )
    text_mean, text_scale = flat.astype(np.float64).mean(axis=0), 1 / flat.astype(np.float64).std(axis=0)
    places = states.image.reshape(-1, IMAGE_WIDTH).astype(np.float64)
    image_mean, image_scale = places.mean(axis=0), 1 / places.std(axis=0)
    (wq, bq), (wk, bk), (wv, bv) = (weights(each.linear) for each in (attention.query, attention.key, attention.value))
    result = []
    for row in range(len(states.image)):
        text = (states.text[states.offsets[row] : states.offsets[row + 1]].astype(np.float64) - text_mean) * text_scale
        image = (states.image[row].astype(np.float64) - image_mean) * image_scale
        q, k, v = text @ wq.T + bq, image @ wk.T + bk, image @ wv.T + bv
        heads = []
        for number in range(attention.heads):
            of_keys, of_values = (
                slice(number * width // attention.heads, (number + 1) * width // attention.heads)
                for width in (q.shape[1], v.shape[1])
            )
            answers = []
            for token in q[:, of_keys]:
                scores = np.array([token @ key for key in k[:, of_keys]]) / np.sqrt(k.shape[1] / attention.heads)
                share = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                answers.append(share @ v[:, of_values])
            heads.append(np.mean(answers, axis=0))
        result.append(np.concatenate(heads))
    gate = 1 / (1 + np.exp(-float(attention.gate.detach())))
    return gate * np.array(result)


def seen_by_formula(name, head, seen):
    v, t = standardised(seen.image), standardised(seen.text)
    if name == "concat":
        return [np.hstack([v, t])]
    if name == "gated":
        weight, bias = weights(head.fusion.gate)
        gate = 1 / (1 + np.exp(-(np.hstack([v, t]) @ weight.T + bias)))
        return [gate * v + (1 - gate) * t]
    if name == "film":
        weight, _ = weights(head.fusion.modulation)
        gamma, beta = 1 + t @ weight[:DIM].T, t @ weight[DIM:].T
        return [np.hstack([gamma * v + beta, t])]
    if name == "product":
        return [np.hstack([v, t, v * t])]
    if name == "late":
        return [v, t]
    assert name == "cross_attn", f"write the formula of {name} here"
    return [np.hstack([attended(head, seen.tokens), t, v])]


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_equals_its_formula(name):
    seen = features()
    head, batch = made(name, seen)
    expected = np.mean(
        [
            mlp.double()(torch.from_numpy(inputs)).detach().numpy()
            for mlp, inputs in zip(head.mlps, seen_by_formula(name, head, seen), strict=True)
        ],
        axis=0,
    )
    head.float()
    close_rows(head(batch).detach(), expected)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_is_described_and_its_parameters_counted(name):
    fusion = FUSIONS[name]
    assert fusion.formula
    assert fusion.source
    assert fusion.__doc__
    listed = {each["name"]: each for each in describe_fusions(VIT_B32, 3)}[name]
    mlp = lambda width: (width + 1) * 256 + 512 + 257 * 64 + 128 + 65 * 3  # noqa: E731
    own = {
        "concat": mlp(1024),
        "gated": mlp(512) + 1025,
        "film": mlp(1024) + 2 * 512 * 512,
        "cross_attn": mlp(1024 + 128) + (512 + 1) * 64 + (768 + 1) * 64 + (768 + 1) * 128 + 1,
        "product": mlp(1536),
        "late": 2 * mlp(512),
    }
    assert listed["parameters"] == own[name]
    linear = {"concat": 1025 * 3, "product": 1537 * 3, "late": 2 * 513 * 3}
    assert listed["parameters_linear"] == linear.get(name)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_says_whether_it_has_weights_and_whose_rate_they_have(name):
    fusion = FUSIONS[name](sizes_of(features()))
    assert fusion.has_weights == bool(list(fusion.parameters()))
    assert hasattr(Recipe, fusion.rate)
    assert (fusion.rate == "lr_attn") == ("lr_attn" in Recipe(fusion=name).that_matter())


def test_film_starts_as_concat():
    seen = features(with_tokens=False)
    torch.manual_seed(0)
    head = Head(sizes_of(seen), 3, Recipe(fusion="film"))
    head.learn_inputs(seen)
    batch = head.standardised(Batch(torch.from_numpy(seen.image), torch.from_numpy(seen.text)))
    assert torch.equal(head.fusion(batch)[0], torch.cat([batch.image, batch.text], dim=1))


def test_cross_attention_starts_almost_closed_and_ignores_what_is_padded():
    seen = features()
    head = Head(sizes_of(seen), 3, Recipe(fusion="cross_attn"))
    assert float(torch.sigmoid(head.fusion.attention.gate.detach())) == pytest.approx(0.018, abs=1e-3)
    head, batch = made("cross_attn", seen)
    longer = torch.cat([batch.tokens.text, torch.full((N, 3, TEXT_WIDTH), 9.0).half()], dim=1)
    mask = torch.cat([batch.tokens.mask, torch.zeros(N, 3, dtype=torch.bool)], dim=1)
    padded = batch._replace(tokens=TokenBatch(batch.tokens.image, longer, mask))
    close_rows(head(batch).detach(), head(padded).detach())


def test_cross_attention_of_a_text_without_tokens_is_finite():
    seen = features(4)
    seen = Features(seen.image, seen.text, tokens(4, lengths=[0, 3, 2, 1]))
    head, batch = made("cross_attn", seen)
    assert torch.isfinite(head(batch)).all()


def test_fusions_that_cannot_be():
    with pytest.raises(MmcliError, match=r"Gated joins v and t number by number.*found 8 and 9"):
        Head(Sizes(8, 9), 3, Recipe(fusion="gated"))
    with pytest.raises(MmcliError, match="Product joins v and t number by number"):
        Head(Sizes(8, 9), 3, Recipe(fusion="product"))
    for name in ("concat", "film", "late"):
        assert Head(Sizes(8, 9), 3, Recipe(fusion=name)).n_parameters() > 0
    with pytest.raises(MmcliError, match="cross_attn needs token states"):
        Head(Sizes(8, 8), 3, Recipe(fusion="cross_attn"))


def test_late_fusion_trains_each_side_as_a_head_of_its_own():
    """After two epochs without dropout its image MLP is that of an image-only head that began the same."""
    seen = features(with_tokens=False)
    rows = Rows(seen, np.arange(N) % 3)
    settings = {"dropout": 0.0, "hidden": (8,), "batch_size": 7, "lr": 1e-2}
    late, alone = Recipe(fusion="late", **settings), Recipe(modality="image", **settings)
    torch.manual_seed(0)
    heads = [Head(sizes_of(seen), 3, recipe) for recipe in (late, alone)]
    heads[1].mlps[0].load_state_dict(heads[0].mlps[0].state_dict())
    for head, recipe in zip(heads, (late, alone), strict=True):
        head.learn_inputs(seen)
        training = _Training(head, recipe, rows, FitOptions())
        for epoch in (1, 2):
            training._epoch(epoch)
    states = [head.mlps[0].state_dict() for head in heads]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-6) for name in states[0])


def test_the_offsets_of_an_ensemble_are_where_its_heads_are():
    with torch.device("meta"):  # a device of its own, on every machine
        heads = [Head(Sizes(4, 4), 3, Recipe(hidden=(2,)))]
    assert Ensemble(heads, 3).offsets.device.type == "meta"
