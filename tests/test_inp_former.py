"""INP-Former against its formulas in plain float64 NumPy, with the weights taken from the state dict."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import special

from binarize.linear import BinarizationOptions
from binarize.stages import binarize
from models.build import build_inp_former
from models.losses import prototype_coherence_loss

HEADS, DIM, BLOCKS, PATCH = 2, 32, 8, 14
State = dict[str, np.ndarray]


@pytest.fixture
def random_detector(tiny_detector):
    """Float64, with weights so large that every part matters; in two blocks a head has a negative scale."""
    detector = copy.deepcopy(tiny_detector).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if not name.startswith("encoder."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
            if name.endswith(("norm1.weight", "norm2.weight", "learn_scale")):
                parameter.add_(1)
        for block in (1, 4):
            detector.decoder[block].attn.learn_scale[1] = -0.8
    return detector


def numpy_state(detector) -> State:
    return {name: value.double().numpy() for name, value in detector.trained_state().items()}


def random_features(images: int = 2, tokens: int = 16) -> torch.Tensor:
    return torch.randn(images, 2, tokens, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def linear(state: State, name: str, x: np.ndarray) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(state: State, name: str, x: np.ndarray) -> np.ndarray:
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-8) * state[f"{name}.weight"] + state[f"{name}.bias"]


def mlp(state: State, name: str, x: np.ndarray) -> np.ndarray:
    hidden = linear(state, f"{name}.fc1", x)
    return linear(state, f"{name}.fc2", hidden * 0.5 * (1 + special.erf(hidden / math.sqrt(2))))


def slow_attention(state: State, name: str, queries: np.ndarray, sources: np.ndarray, weights_of) -> np.ndarray:
    """For one image: every query (n, C) collects values of the sources (m, C), head by head, row by row."""
    q, kv = linear(state, f"{name}.q", queries), linear(state, f"{name}.kv", sources)
    keys, values = kv[:, :DIM], kv[:, DIM:]
    width = DIM // HEADS
    collected = np.zeros_like(q)
    for head in range(HEADS):
        channels = slice(head * width, (head + 1) * width)
        for row in range(len(queries)):
            weights = weights_of(q[row, channels], keys[:, channels], head)
            for weight, value in zip(weights, values[:, channels], strict=True):
                collected[row, channels] += weight * value
    return linear(state, f"{name}.proj", collected)


def softmax_weights(query: np.ndarray, keys: np.ndarray, head: int) -> np.ndarray:
    exponentials = np.exp(keys @ query / math.sqrt(len(query)))
    return exponentials / exponentials.sum()


def slow_extractor(state: State, name: str, queries: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    normed, sources = layer_norm(state, f"{name}.norm1", queries), layer_norm(state, f"{name}.norm1", tokens)
    queries = queries + slow_attention(state, f"{name}.attn", normed, sources, softmax_weights)
    return queries + mlp(state, f"{name}.mlp", layer_norm(state, f"{name}.norm2", queries))


def slow_decoder_block(state: State, name: str, tokens: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    def relu_of_scaled_cosine(query, keys, head):
        scale = state[f"{name}.attn.learn_scale"][head, 0, 0]
        cosines = keys @ query / (np.linalg.norm(keys, axis=1) * np.linalg.norm(query))
        return np.maximum(scale * cosines, 0)

    normed, sources = layer_norm(state, f"{name}.norm1", tokens), layer_norm(state, f"{name}.norm1", prototypes)
    rewritten = slow_attention(state, f"{name}.attn", normed, sources, relu_of_scaled_cosine)
    return rewritten + mlp(state, f"{name}.mlp", layer_norm(state, f"{name}.norm2", rewritten))


def slow_reconstruct(state: State, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One image: group means (2, N, C) -> reconstruction (2, N, C) and prototypes (M, C)."""
    fused = (features[0] + features[1]) / 2
    prototypes = slow_extractor(state, "aggregation.0", state["prototype_token"], fused)
    outputs = [mlp(state, "bottleneck.0", fused)]
    for block in range(BLOCKS):
        outputs.append(slow_decoder_block(state, f"decoder.{block}", outputs[-1], prototypes))
    shallow, deep = (
        np.mean(outputs[5:9], axis=0),
        np.mean(outputs[1:5], axis=0),
    )  # the last blocks rebuild the first taps
    return np.stack([shallow, deep]), prototypes


def slow_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 - cosine over the last axis."""
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return 1 - (first * second).sum(axis=-1) / lengths


def slow_enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear with the corner pixels kept in the corners."""
    for _ in range(2):
        positions = np.linspace(0, len(image) - 1, size)
        image = np.array([np.interp(positions, np.arange(len(image)), column) for column in image.T])
    return image


def test_extractor_block_follows_its_formula(random_detector):
    features, state = random_features(), numpy_state(random_detector)
    tokens = features.mean(dim=1)
    queries = torch.randn(2, 6, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    result = random_detector.aggregation[0](queries, tokens).detach().numpy()
    for image in range(2):
        expected = slow_extractor(state, "aggregation.0", queries[image].numpy(), tokens[image].numpy())
        np.testing.assert_allclose(result[image], expected, atol=1e-9)


@pytest.mark.parametrize("block", [0, 1, 7])
def test_decoder_block_follows_its_formula(random_detector, block):
    state = numpy_state(random_detector)
    tokens = random_features()[:, 0]
    prototypes = torch.randn(2, 6, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    result = random_detector.decoder[block](tokens, prototypes).detach().numpy()
    for image in range(2):
        expected = slow_decoder_block(state, f"decoder.{block}", tokens[image].numpy(), prototypes[image].numpy())
        np.testing.assert_allclose(result[image], expected, atol=1e-9)


def test_attention_has_no_residual(random_detector):
    """With a zero projection nothing of a token is left: all tokens become equal."""
    block = random_detector.decoder[0]
    torch.nn.init.zeros_(block.attn.proj.weight)
    result = block(random_features()[:, 0], random_features()[:, 1, :6])
    torch.testing.assert_close(result, result[:1, :1].expand_as(result))


def test_reconstruction_follows_its_formula(random_detector):
    features, state = random_features(3), numpy_state(random_detector)
    reconstruction, prototypes = random_detector.reconstruct(features), random_detector.prototypes(features.mean(dim=1))
    assert reconstruction.shape == (3, 2, 16, DIM)
    for image in range(3):
        expected, expected_prototypes = slow_reconstruct(state, features[image].numpy())
        np.testing.assert_allclose(prototypes[image].detach().numpy(), expected_prototypes, atol=1e-9)
        np.testing.assert_allclose(reconstruction[image].detach().numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("tokens", [16, 25])
def test_anomaly_map_follows_its_formula(random_detector, tokens):
    features, state = random_features(2, tokens), numpy_state(random_detector)
    maps = random_detector.anomaly_map(features)
    grid = math.isqrt(tokens)
    assert maps.shape == (2, grid * PATCH, grid * PATCH)
    assert maps.dtype == torch.float32
    for image in range(2):
        distance = slow_distance(features[image].numpy(), slow_reconstruct(state, features[image].numpy())[0])
        groups = [slow_enlarge(group.reshape(grid, grid), grid * PATCH) for group in distance]
        np.testing.assert_allclose(maps[image].numpy(), (groups[0] + groups[1]) / 2, atol=1e-5)


@pytest.mark.parametrize("tokens", [16, 25])
def test_prototype_map_follows_its_formula(random_detector, tokens):
    features, state = random_features(2, tokens), numpy_state(random_detector)
    maps = random_detector.prototype_map(features)
    grid = math.isqrt(tokens)
    assert maps.shape == (2, grid * PATCH, grid * PATCH)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    for image in range(2):
        fused = features[image].numpy().mean(axis=0)
        prototypes = slow_extractor(state, "aggregation.0", state["prototype_token"], fused)
        nearest = [min(slow_distance(token, prototype) for prototype in prototypes) for token in fused]
        expected = slow_enlarge(np.array(nearest).reshape(grid, grid), grid * PATCH)
        np.testing.assert_allclose(maps[image].numpy(), expected, atol=1e-5)


def test_prototype_map_is_the_same_whatever_the_decoder(random_detector):
    random_detector.float()
    features = random_features().float()
    prototype_map, anomaly_map = random_detector.prototype_map(features), random_detector.anomaly_map(features)
    binarize(random_detector, 2, BinarizationOptions())
    assert not torch.equal(random_detector.anomaly_map(features), anomaly_map)
    assert torch.equal(random_detector.prototype_map(features), prototype_map)
    with torch.no_grad():
        for part in (random_detector.decoder, random_detector.bottleneck):
            for parameter in part.parameters():
                parameter.fill_(math.nan)
    assert torch.equal(random_detector.prototype_map(features), prototype_map)


def test_prototype_map_of_images_is_that_of_their_features(tiny_detector):
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    features = tiny_detector.encode(images)
    assert tiny_detector.prototype_map(images).shape == (2, 56, 56)
    assert torch.equal(tiny_detector.prototype_map(images), tiny_detector.prototype_map(features))


def test_training_loss_is_the_mean_of_two_global_cosines_plus_a_fifth_of_the_coherence(random_detector):
    features, state = random_features(3), numpy_state(random_detector)
    loss, parts = random_detector.float().training_loss(features.float())
    reconstruction, coherence = [], []
    for image in features.numpy():
        rebuilt, prototypes = slow_reconstruct(state, image)
        reconstruction.append(slow_distance(image.reshape(2, -1), rebuilt.reshape(2, -1)).mean())
        fused = (image[0] + image[1]) / 2
        nearest = [slow_distance(token[None], prototypes).min() for token in fused]
        coherence.append(np.mean(nearest))
    assert parts["reconstruction"].item() == pytest.approx(np.mean(reconstruction), abs=1e-5)
    assert parts["coherence"].item() == pytest.approx(0.2 * np.mean(coherence), abs=1e-5)
    assert loss.item() == pytest.approx(np.mean(reconstruction) + 0.2 * np.mean(coherence), abs=1e-5)
    assert set(parts) == {"reconstruction", "coherence"}
    assert not any(part.requires_grad for part in parts.values())


def test_coherence_trains_only_the_extractor_and_its_tokens(random_detector):
    features = random_features()
    prototypes = random_detector.prototypes(features.mean(dim=1))
    prototype_coherence_loss(features.mean(dim=1), prototypes).backward()
    touched = {name.split(".")[0] for name, value in random_detector.named_parameters() if value.grad is not None}
    assert touched == {"aggregation", "prototype_token"}


def test_encoder_groups_are_the_means_of_blocks_2_to_5_and_6_to_9(tiny_detector):
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    outputs = []
    hooks = [
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
        for block in tiny_detector.encoder.vit.blocks
    ]
    features = tiny_detector.encode(images)
    for hook in hooks:
        hook.remove()
    assert len(outputs) == 10
    patches = [output[:, 1:].double() for output in outputs]  # without the class token
    expected = torch.stack([sum(patches[2:6]) / 4, sum(patches[6:10]) / 4], dim=1)
    assert features.shape == (2, 2, 16, DIM)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.double(), expected, atol=1e-5, rtol=1e-5)


def test_features_give_the_same_loss_map_and_gradient_as_images(tiny_detector):
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    features = tiny_detector.encode(images)
    gradients = []
    losses = []
    for inputs in (images, features):
        tiny_detector.zero_grad()
        loss, _ = tiny_detector.training_loss(inputs)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad.clone() for parameter in tiny_detector.trainable_parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    assert torch.equal(tiny_detector.anomaly_map(images), tiny_detector.anomaly_map(features))


def test_a_map_does_not_depend_on_the_rest_of_the_batch(tiny_detector):
    features = tiny_detector.encode(torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0)))
    alone = torch.cat([tiny_detector.anomaly_map(image[None]) for image in features])
    torch.testing.assert_close(tiny_detector.anomaly_map(features), alone, atol=1e-6, rtol=1e-5)


def test_initial_weights_have_the_published_statistics(tiny_encoder):
    torch.manual_seed(0)
    detector = build_inp_former(tiny_encoder, 500)
    state = detector.trained_state()
    names = [name for name in state if name.endswith(".weight") and "norm" not in name]
    linear_weights = [state[name].flatten() for name in names]
    assert len(linear_weights) == 2 + 5 + 8 * 5
    pooled = torch.cat(linear_weights)
    assert pooled.abs().max() <= 0.03
    assert pooled.mean().abs() < 2e-4
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    cut_at_three = math.sqrt(1 - 6 * density / math.erf(3 / math.sqrt(2)))  # deviation left of a unit normal
    assert pooled.std() == pytest.approx(0.01 * cut_at_three, rel=0.01)
    for weights in linear_weights:
        assert weights.std() == pytest.approx(0.01 * cut_at_three, rel=0.1)
    biases = [value for name, value in state.items() if name.endswith(".bias")]
    assert len(biases) == len(linear_weights) + 2 * 9
    assert all((bias == 0).all() for bias in biases)
    assert all((value == 1).all() for name, value in state.items() if "norm" in name and name.endswith("weight"))
    assert all((value == 1).all() for name, value in state.items() if name.endswith("learn_scale"))
    tokens = state["prototype_token"].double()
    assert tokens.mean().abs() < 0.03
    assert tokens.std() == pytest.approx(1, abs=0.03)
    assert (tokens**4).mean() == pytest.approx(3, abs=0.3)
    assert tokens.abs().max() > 3


def test_the_encoder_is_frozen_and_stays_in_evaluation_mode(tiny_detector):
    before = {name: value.clone() for name, value in tiny_detector.encoder.state_dict().items()}
    tiny_detector.train()
    assert tiny_detector.decoder[0].training
    assert not any(module.training for module in tiny_detector.encoder.modules())
    loss, _ = tiny_detector.training_loss(torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)))
    loss.backward()
    encoder = dict(tiny_detector.encoder.named_parameters())
    assert not any(parameter.requires_grad for parameter in encoder.values())
    assert all(parameter.grad is None for parameter in encoder.values())
    trained = list(tiny_detector.trainable_parameters())
    assert all(parameter.grad is not None for parameter in trained)
    assert not {id(parameter) for parameter in trained} & {id(parameter) for parameter in encoder.values()}
    assert len(trained) + len(encoder) == len(list(tiny_detector.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in tiny_detector.encoder.state_dict().items())


def published_names() -> dict[str, tuple[int, ...]]:
    """State dict of the published checkpoints without the encoder, for 32 channels, 2 heads, 6 prototypes."""
    shapes = {"prototype_token": (6, DIM)}
    linears = {"bottleneck.0.fc1": (4, 1), "bottleneck.0.fc2": (1, 4)}
    blocks = ["aggregation.0"] + [f"decoder.{index}" for index in range(BLOCKS)]
    for block in blocks:
        linears |= {f"{block}.attn.q": (1, 1), f"{block}.attn.kv": (2, 1), f"{block}.attn.proj": (1, 1)}
        linears |= {f"{block}.mlp.fc1": (4, 1), f"{block}.mlp.fc2": (1, 4)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (DIM,), f"{block}.{norm}.bias": (DIM,)}
        if block.startswith("decoder"):
            shapes[f"{block}.attn.learn_scale"] = (HEADS, 1, 1)
    for name, (outputs, inputs) in linears.items():
        shapes |= {f"{name}.weight": (outputs * DIM, inputs * DIM), f"{name}.bias": (outputs * DIM,)}
    return shapes


def test_state_dict_has_the_published_names_and_shapes(tiny_detector):
    assert {name: tuple(value.shape) for name, value in tiny_detector.trained_state().items()} == published_names()


def test_trained_state_is_all_that_a_second_detector_needs(tiny_encoder, tiny_detector):
    other = build_inp_former(tiny_encoder, 6)
    features = random_features().float()
    assert not torch.equal(other.anomaly_map(features), tiny_detector.anomaly_map(features))
    other.load_trained_state(tiny_detector.trained_state())
    assert torch.equal(other.anomaly_map(features), tiny_detector.anomaly_map(features))


def test_incomplete_and_surplus_states_are_refused_by_name(tiny_detector):
    state = tiny_detector.trained_state()
    state["decoder.8.norm1.bias"] = state.pop("decoder.3.attn.learn_scale")
    with pytest.raises(RuntimeError, match=r"decoder\.3\.attn\.learn_scale[\s\S]*decoder\.8\.norm1\.bias"):
        tiny_detector.load_trained_state(state)


def test_the_prototype_count_is_free(tiny_encoder):
    detector = build_inp_former(tiny_encoder, 11)
    features = random_features().float()
    assert detector.prototypes(features.mean(dim=1)).shape == (2, 11, DIM)
    assert detector.reconstruct(features).shape == features.shape


def test_losses_and_prototype_map_are_float32_under_mixed_precision(tiny_detector):
    features = random_features().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = tiny_detector.training_loss(features)
        prototype_map = tiny_detector.prototype_map(features)
    assert {loss.dtype} | {part.dtype for part in parts.values()} == {torch.float32}
    assert prototype_map.dtype == torch.float32
