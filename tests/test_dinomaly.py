"""Dinomaly against its formulas in plain float64 NumPy, with the weights taken from the state dict."""

import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.build import RANDOM_TINY_ENCODER, build_dinomaly
from models.dinomaly import Dinomaly, DinomalyOptions
from models.encoder import FrozenEncoder
from models.layers import linear_attention
from tests.test_inp_former import (
    BLOCKS,
    DIM,
    HEADS,
    PATCH,
    State,
    layer_norm,
    linear,
    mlp,
    numpy_state,
    slow_distance,
    slow_enlarge,
)

TAPS = list(range(2, 10))
VARIANTS = {
    "reference": {},
    "softmax": {"decoder_attention": "softmax"},
    "one group": {"groups": 1},
    "no class token": {"remove_class_token": True},
    "recentred": {"recentre": True},
    "all": {"decoder_attention": "softmax", "groups": 1, "remove_class_token": True, "recentre": True},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def encoder_with_registers() -> FrozenEncoder:
    """A tiny encoder with 5 prefix tokens, the class token and 4 registers, and weights so large that every token differs."""
    generator = torch.Generator().manual_seed(4)
    vit = VisionTransformer(
        img_size=56,
        patch_size=PATCH,
        embed_dim=DIM,
        depth=TAPS[-1] + 1,
        num_heads=HEADS,
        num_classes=0,
        reg_tokens=4,
        no_embed_class=True,
    )
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return FrozenEncoder(vit, TAPS, RANDOM_TINY_ENCODER, "seeded", "0", 0)


@pytest.fixture(scope="module")
def register_encoder():
    return encoder_with_registers()


@pytest.fixture(params=["class token", "registers"])
def encoder(request, tiny_encoder, register_encoder):
    return tiny_encoder if request.param == "class token" else register_encoder


def random_dinomaly(encoder: FrozenEncoder, **options) -> Dinomaly:
    """In evaluation mode, with weights so large that every part matters."""
    detector = build_dinomaly(encoder, DinomalyOptions(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.startswith("encoder."):
                continue
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name.endswith(("norm1.weight", "norm2.weight")):
                parameter.add_(1)
    return detector.eval()


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_features(encoder: FrozenEncoder, images: int = 2, patches: int = 16) -> torch.Tensor:
    return normal(images, 2, encoder.prefix_tokens + patches, DIM)


def double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def phi(u: np.ndarray) -> np.ndarray:
    """ELU(u) + 1."""
    return np.where(u > 0, u, np.exp(np.minimum(u, 0)) - 1) + 1


def slow_linear_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(..., tokens, d) each, tokens and channels summed one pair at a time by the subscripts."""
    summary = np.einsum("...sd,...se->...de", phi(key), value)
    normaliser = np.einsum("...td,...sd->...t", phi(query), phi(key)) + 1e-8
    return np.einsum("...td,...de->...te", phi(query), summary) / normaliser[..., None]


def slow_softmax_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    logits = np.einsum("...td,...sd->...ts", query, key) / math.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("...ts,...se->...te", weights / weights.sum(axis=-1, keepdims=True), value)


ATTENTIONS = {"linear": slow_linear_attention, "softmax": slow_softmax_attention}


def slow_block(state: State, name: str, tokens: np.ndarray, attention: str) -> np.ndarray:
    """For one image: tokens (N, C) through one pre-norm block."""
    projected = linear(state, f"{name}.attn.qkv", layer_norm(state, f"{name}.norm1", tokens))
    query, key, value = projected.reshape(len(tokens), 3, HEADS, DIM // HEADS).transpose(1, 2, 0, 3)
    heads = ATTENTIONS[attention](query, key, value)
    tokens = tokens + linear(state, f"{name}.attn.proj", np.concatenate(list(heads), axis=-1))
    return tokens + mlp(state, f"{name}.mlp", layer_norm(state, f"{name}.norm2", tokens))


def slow_reconstruct(state: State, features: np.ndarray, prefix: int, options: DinomalyOptions) -> np.ndarray:
    """One image: features (2, P + N, C) -> (groups, N, C)."""
    tokens = (features[0] + features[1]) / 2
    if options.remove_class_token:
        tokens, prefix = tokens[prefix:], 0
    tokens = mlp(state, "bottleneck.0", tokens)
    outputs = []
    for block in range(BLOCKS):
        tokens = slow_block(state, f"decoder.{block}", tokens, options.decoder_attention)
        outputs.append(tokens[prefix:])
    members = {1: [range(8)], 2: [(7, 6, 5, 4), (3, 2, 1, 0)]}[options.groups]  # the last blocks rebuild the first taps
    return np.stack([sum(outputs[block] for block in group) / len(group) for group in members])


def slow_target(features: np.ndarray, prefix: int, options: DinomalyOptions) -> np.ndarray:
    """One image: features (2, P + N, C) -> (groups, N, C)."""
    groups = features if options.groups == 2 else (features[:1] + features[1:]) / 2
    if not options.recentre:
        return groups[:, prefix:]
    relative = groups[:, prefix:] - groups[:, :1]
    mean = relative.mean(axis=-1, keepdims=True)
    return (relative - mean) / np.sqrt(((relative - mean) ** 2).mean(axis=-1, keepdims=True) + 1e-8)


def slow_map(state: State, features: np.ndarray, prefix: int, options: DinomalyOptions) -> np.ndarray:
    """One image: features (2, P + N, C) -> anomaly map."""
    distances = slow_distance(slow_target(features, prefix, options), slow_reconstruct(state, features, prefix, options))
    grid = math.isqrt(distances.shape[-1])
    return np.mean([slow_enlarge(distance.reshape(grid, grid), grid * PATCH) for distance in distances], axis=0)


def test_linear_attention_by_hand():
    query = torch.tensor([[0, -math.log(2)]])  # phi: 1, 1/2
    key = torch.tensor([[1, 0], [-math.log(4), 2]])  # phi: 2, 1 and 1/4, 3
    value = torch.tensor([[4.0, 0.0], [0.0, 8.0]])
    # weights of the two values: 1*2 + 1/2*1 = 2.5 and 1*1/4 + 1/2*3 = 1.75
    result = linear_attention(query[None, None], key[None, None], value[None, None])
    assert result.flatten().tolist() == pytest.approx([4 * 2.5 / 4.25, 8 * 1.75 / 4.25], rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 21])
def test_linear_attention_follows_its_formula_and_no_other(tokens):
    query, key, value = (normal(2, 3, tokens, 16, seed=seed) * 2 for seed in (1, 2, 3))
    result = double(linear_attention(query, key, value))
    arrays = [double(part) for part in (query, key, value)]
    np.testing.assert_allclose(result, slow_linear_attention(*arrays), rtol=1e-5, atol=1e-6)
    if tokens == 1:
        np.testing.assert_allclose(result, arrays[2], rtol=1e-5)
        return
    scaled = slow_linear_attention(arrays[0] / 4, *arrays[1:])  # 1 / sqrt(d)
    mean = np.broadcast_to(arrays[2].mean(axis=-2, keepdims=True), result.shape)
    rectified = np.einsum("bhtd,bhsd->bhts", *(np.maximum(part, 0) for part in arrays[:2]))  # ReLU in the place of ELU + 1
    rectified = np.einsum("bhts,bhse->bhte", rectified / rectified.sum(axis=-1, keepdims=True), arrays[2])
    undivided = np.einsum("bhtd,bhsd,bhse->bhte", phi(arrays[0]), phi(arrays[1]), arrays[2])
    for wrong in (scaled, mean, rectified, undivided, slow_softmax_attention(*arrays)):
        assert abs(wrong - result).max() > 1e-2


def test_the_epsilon_of_linear_attention_is_added_to_its_normaliser():
    query = torch.full((1, 1, 1, 1), -9.2)
    key = torch.tensor([-9.2, -9.4]).reshape(1, 1, 2, 1)  # the normaliser: e^-18.4 + e^-18.6 = 1.8e-8
    value = torch.tensor([1.0, 3.0]).reshape(1, 1, 2, 1)
    first, second = math.exp(-18.4), math.exp(-18.6)
    assert linear_attention(query, key, value).item() == pytest.approx((first + 3 * second) / (first + second + 1e-8), rel=1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_linear_attention_of_underflowing_queries_and_keys_is_zero(kind):
    projected = torch.full((3, 1, 2, 5, 4), -200.0, dtype=kind, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        result = linear_attention(*projected.unbind(0))
    result.sum().backward()
    assert (result == 0).all()
    assert projected.grad.isfinite().all()


def test_linear_attention_rounds_once_under_mixed_precision():
    """Its sums over all tokens are float32's: the result is the exact one, rounded to the eight bits of bfloat16."""
    parts = [normal(1, 2, 784, 16, seed=seed).bfloat16() for seed in (1, 2, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_attention(*parts)
    np.testing.assert_allclose(double(result), slow_linear_attention(*map(double, parts)), rtol=1.001 * 2**-8, atol=1e-6)


def test_bottleneck_follows_its_formula(tiny_encoder):
    detector = random_dinomaly(tiny_encoder)
    tokens = normal(2, 21, DIM)
    expected = mlp(numpy_state(detector), "bottleneck.0", double(tokens))  # no norm, no residual
    np.testing.assert_allclose(double(detector.through_bottleneck(tokens)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [0, 7])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_decoder_block_follows_its_formula(tiny_encoder, attention, block):
    detector = random_dinomaly(tiny_encoder, decoder_attention=attention)
    state, tokens = numpy_state(detector), normal(2, 21, DIM)
    result = double(detector.decoder[block](tokens))
    for image in range(2):
        expected = slow_block(state, f"decoder.{block}", double(tokens[image]), attention)
        np.testing.assert_allclose(result[image], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("deviation", [1e-3, 1e-4, 1e-5])
def test_both_norms_add_1e_8_to_the_variance(tiny_encoder, deviation):
    """Tokens of so small a deviation tell 1e-8 from every other epsilon."""
    detector = random_dinomaly(tiny_encoder)
    tokens = deviation * normal(1, 21, DIM)
    for silenced in (None, "attn.proj"):  # without the attention's part the second norm sees the small tokens, too
        if silenced:
            with torch.no_grad():
                for parameter in detector.decoder[0].get_submodule(silenced).parameters():
                    parameter.zero_()
        expected = slow_block(numpy_state(detector), "decoder.0", double(tokens[0]), "linear")
        np.testing.assert_allclose(double(detector.decoder[0](tokens))[0], expected, rtol=1e-4, atol=1e-4)


class AddOne(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + 1


@pytest.mark.parametrize(("groups", "raised"), [(2, [6.5, 2.5]), (1, [4.5])])
def test_the_last_blocks_rebuild_the_lower_taps(tiny_encoder, groups, raised):
    """Block i of 8 returns its input + i: blocks 5 to 8 have the mean 6.5, 1 to 4 have 2.5."""
    detector = random_dinomaly(tiny_encoder, groups=groups)
    detector.bottleneck = nn.ModuleList([nn.Identity()])
    detector.decoder = nn.ModuleList([AddOne() for _ in range(BLOCKS)])
    features = random_features(tiny_encoder)
    fused = (features[:, 0] + features[:, 1]) / 2
    expected = torch.stack([fused[:, 1:] + value for value in raised], dim=1)
    torch.testing.assert_close(detector.reconstruct(features), expected)


def tapped_outputs(detector: Dinomaly, images: torch.Tensor) -> tuple[torch.Tensor, list[np.ndarray]]:
    """What `encode` makes of images, and the raw outputs of all blocks that ran meanwhile, all tokens."""
    outputs = []
    hooks = [
        block.register_forward_hook(lambda block, inputs, output: outputs.append(double(output)))
        for block in detector.encoder.vit.blocks
    ]
    features = detector.encode(images)
    for hook in hooks:
        hook.remove()
    return features, outputs


def test_features_are_two_means_of_taps_with_class_token_and_registers_first(encoder):
    images = normal(2, 3, 56, 56)
    features, outputs = tapped_outputs(random_dinomaly(encoder), images)
    assert len(outputs) == 10
    assert encoder.prefix_tokens in (1, 5)
    assert features.shape == (2, 2, encoder.prefix_tokens + 16, DIM)
    assert features.dtype == torch.float32
    expected = np.stack([sum(outputs[2:6]) / 4, sum(outputs[6:10]) / 4], axis=1)
    np.testing.assert_allclose(double(features), expected, rtol=1e-5, atol=1e-5)
    patches = np.stack([double(output) for output in encoder(images)], axis=1)
    np.testing.assert_allclose(expected[:, 0, encoder.prefix_tokens :], patches[:, :4].mean(axis=1), rtol=1e-5, atol=1e-5)


@every_variant
def test_reconstruction_follows_its_formula(encoder, variant):
    detector = random_dinomaly(encoder, **variant)
    features, state = random_features(encoder, images=3), numpy_state(detector)
    result = double(detector.reconstruct(features))
    assert result.shape == (3, variant.get("groups", 2), 16, DIM)
    for image in range(3):
        expected = slow_reconstruct(state, double(features[image]), encoder.prefix_tokens, detector.options)
        np.testing.assert_allclose(result[image], expected, rtol=1e-4, atol=1e-4)


@every_variant
def test_target_follows_its_formula(encoder, variant):
    detector = random_dinomaly(encoder, **variant)
    features = random_features(encoder)
    for image in range(2):
        expected = slow_target(double(features[image]), encoder.prefix_tokens, detector.options)
        np.testing.assert_allclose(double(detector.target(features))[image], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_recentring_adds_1e_8_to_the_variance(tiny_encoder, groups):
    detector = random_dinomaly(tiny_encoder, recentre=True, groups=groups)
    features = 1 + 2**-13 * normal(1, 2, 17, DIM).round()  # exact differences of about 1e-4
    expected = slow_target(double(features[0]), 1, detector.options)
    np.testing.assert_allclose(double(detector.target(features))[0], expected, rtol=1e-4, atol=1e-5)


def test_recentring_changes_the_target_alone(encoder):
    features = random_features(encoder)
    plain, recentred = (random_dinomaly(encoder, recentre=recentre) for recentre in (False, True))
    assert torch.equal(plain.reconstruct(features), recentred.reconstruct(features))
    assert (plain.target(features) - recentred.target(features)).abs().max() > 0.1


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_prefix_token_travels_through_the_decoder_unless_removed(register_encoder, attention):
    features = random_features(register_encoder)
    with_prefix, without = (
        random_dinomaly(register_encoder, decoder_attention=attention, remove_class_token=removed) for removed in (False, True)
    )
    for token in range(5):
        changed = features.clone()
        changed[:, :, token] += 5 * normal(DIM, seed=token)
        assert (with_prefix.reconstruct(changed) - with_prefix.reconstruct(features)).abs().max() > 1e-3
        assert torch.equal(without.reconstruct(changed), without.reconstruct(features))
        assert torch.equal(with_prefix.target(changed), with_prefix.target(features))


def test_registers_do_not_recentre(register_encoder):
    detector = random_dinomaly(register_encoder, recentre=True)
    features = random_features(register_encoder)
    target = detector.target(features)
    features[:, :, 1:5] += 5
    assert torch.equal(detector.target(features), target)
    features[:, :, 0] += normal(DIM)
    assert not torch.equal(detector.target(features), target)


@every_variant
@pytest.mark.parametrize("patches", [16, 25])
def test_anomaly_map_follows_its_formula(encoder, variant, patches):
    detector = random_dinomaly(encoder, **variant)
    features, state = random_features(encoder, patches=patches), numpy_state(detector)
    maps = detector.anomaly_map(features)
    side = math.isqrt(patches) * PATCH
    assert maps.shape == (2, side, side)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    for image in range(2):
        expected = slow_map(state, double(features[image]), encoder.prefix_tokens, detector.options)
        np.testing.assert_allclose(double(maps[image]), expected, atol=2e-5)


@every_variant
def test_the_whole_network_follows_its_formula_from_the_encoders_blocks_to_the_map(encoder, variant):
    detector = random_dinomaly(encoder, **variant)
    images = normal(2, 3, 56, 56)
    _, outputs = tapped_outputs(detector, images)
    features = np.stack([sum(outputs[2:6]) / 4, sum(outputs[6:10]) / 4], axis=1)
    maps = double(detector.anomaly_map(images))
    for image in range(2):
        expected = slow_map(numpy_state(detector), features[image], encoder.prefix_tokens, detector.options)
        np.testing.assert_allclose(maps[image], expected, atol=5e-5)


def test_a_map_does_not_depend_on_the_rest_of_the_batch(encoder):
    detector = random_dinomaly(encoder)
    features = random_features(encoder, images=3)
    alone = torch.cat([detector.anomaly_map(image[None]) for image in features])
    torch.testing.assert_close(detector.anomaly_map(features), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_state_dict_has_the_published_names_and_shapes(tiny_encoder, attention):
    linears = {"bottleneck.0.fc1": (4, 1), "bottleneck.0.fc2": (1, 4)}
    shapes = {}
    for block in range(BLOCKS):
        name = f"decoder.{block}"
        linears |= {
            f"{name}.attn.qkv": (3, 1),
            f"{name}.attn.proj": (1, 1),
            f"{name}.mlp.fc1": (4, 1),
            f"{name}.mlp.fc2": (1, 4),
        }
        for norm in ("norm1", "norm2"):
            shapes |= {f"{name}.{norm}.weight": (DIM,), f"{name}.{norm}.bias": (DIM,)}
    for name, (outputs, inputs) in linears.items():
        shapes |= {f"{name}.weight": (outputs * DIM, inputs * DIM), f"{name}.bias": (outputs * DIM,)}
    state = build_dinomaly(tiny_encoder, DinomalyOptions(decoder_attention=attention)).trained_state()
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes
