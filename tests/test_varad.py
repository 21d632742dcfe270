"""VarAD's network against its formulas in plain float64, and who may see whom."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from binarize.cost import cost_table
from models.build import RANDOM_TINY_ENCODER, build_encoder, build_encoder_without_weights
from models.state_space import DIRECTIONS, PRESETS, StateSpaceBlock, in_order, in_place
from models.varad import ADAPTERS, VarAD, VarADOptions, VarADTraining, token_variance

DIM, GRID, M = 32, 4, 5
EVERY_DIRECTION = pytest.mark.parametrize("direction", DIRECTIONS)
EVERY_PRESET = pytest.mark.parametrize("preset", PRESETS)


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(RANDOM_TINY_ENCODER, GRID * 14, taps="thirds")


def block_of(preset: str, directions=DIRECTIONS, distance: int = M) -> StateSpaceBlock:
    """In float64, with weights so large that every part matters."""
    torch.manual_seed(0)
    block = StateSpaceBlock(DIM, GRID, distance, directions, PRESETS[preset]).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        block.start += torch.randn(block.start.shape, generator=generator, dtype=torch.float64)
    return block


def tokens_of(images: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return F.normalize(torch.randn(images, GRID * GRID, DIM, generator=generator, dtype=torch.float64), dim=-1)


def order_of(direction: str, grid: int = GRID) -> torch.Tensor:
    """Which token comes when."""
    return in_order(torch.arange(grid * grid).view(1, -1, 1), direction).flatten()


@EVERY_DIRECTION
def test_what_was_put_in_order_goes_back_to_its_place(direction):
    assert torch.equal(in_place(in_order(tokens_of(), direction), direction), tokens_of())


def test_directions_by_hand():
    orders = {direction: order_of(direction, 2).tolist() for direction in DIRECTIONS}
    assert orders == {
        "row": [0, 1, 2, 3],
        "column": [0, 2, 1, 3],
        "reversed_row": [3, 2, 1, 0],
        "reversed_column": [3, 1, 2, 0],
    }


@EVERY_PRESET
@EVERY_DIRECTION
def test_a_prediction_sees_the_tokens_up_to_m_before_it_and_no_other(preset, direction):
    block, tokens = block_of(preset, (direction,)), tokens_of(1).requires_grad_()
    order = order_of(direction).tolist()
    predicted = block(tokens)
    for place, token in enumerate(order):
        (gradient,) = torch.autograd.grad(predicted[0, token].square().sum(), tokens, retain_graph=True)
        seen = {index for index in range(GRID * GRID) if gradient[0, index].abs().sum() > 0}
        assert seen == set(order[: max(0, place - M + 1)])


def layer_norm(layer, values: np.ndarray) -> np.ndarray:
    mean, variance = values.mean(-1, keepdims=True), values.var(-1, keepdims=True)
    return (values - mean) / np.sqrt(variance + 1e-6) * array(layer.weight) + array(layer.bias)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def silu(values: np.ndarray) -> np.ndarray:
    return values / (1 + np.exp(-values))


def gelu(values: np.ndarray) -> np.ndarray:
    return values * 0.5 * (1 + np.vectorize(math.erf)(values / math.sqrt(2)))


def slow_block(block: StateSpaceBlock, tokens: np.ndarray, preset: str) -> np.ndarray:
    """One image, tokens (N, C): each direction's whole sequence, start tokens first, one time step after the other."""
    total = np.zeros_like(tokens)
    for k, direction in enumerate(block.directions):
        order = order_of(direction).numpy()
        start = array(block.start[k])
        sequence = np.concatenate([start, tokens[order]])
        normed = layer_norm(block.norm1, sequence)
        inputs, gate = np.split(normed @ array(block.in_proj.weight).T, 2, axis=-1)
        if preset == "paper":
            kernel, bias = array(block.convolution.weight)[:, 0], array(block.convolution.bias)
            padded = np.concatenate([np.zeros((3, inputs.shape[1])), inputs])
            inputs = np.stack([(padded[t : t + 4] * kernel.T).sum(0) for t in range(len(inputs))]) + bias
        inputs = silu(inputs)
        rank, states = 2, 16 if preset == "paper" else 6
        projected = inputs @ array(block.x_proj[k]).T
        low_rank, b, c = projected[:, :rank], projected[:, rank : rank + states], projected[:, rank + states :]
        step = np.log1p(np.exp(low_rank @ array(block.step_weight[k]).T + array(block.step_bias[k])))
        decay, state, scanned = -np.exp(array(block.log_decay[k])), np.zeros((2 * DIM, states)), []
        for t in range(len(sequence)):
            state = np.exp(step[t][:, None] * decay) * state + (step[t] * inputs[t])[:, None] * b[t]
            scanned.append(state @ c[t] + array(block.skip[k]) * inputs[t])
        scanned = np.stack(scanned)
        if preset == "released":
            scanned = layer_norm(block.scan_norm, scanned)
        out = (scanned * silu(gate)) @ array(block.out_proj.weight).T
        out += normed if preset == "released" else sequence
        if preset == "released":
            normed = layer_norm(block.norm2, out)
            hidden = gelu(normed @ array(block.mlp.fc1.weight).T + array(block.mlp.fc1.bias))
            out = normed + hidden @ array(block.mlp.fc2.weight).T + array(block.mlp.fc2.bias)
        total[order] += out[len(start) - M : len(sequence) - M]
    return total / len(block.directions)


@EVERY_PRESET
@pytest.mark.parametrize("directions", [DIRECTIONS, ("reversed_column",)])
def test_block_follows_its_formula(preset, directions):
    block, tokens = block_of(preset, directions), tokens_of()
    expected = np.stack([slow_block(block, image, preset) for image in tokens.numpy()])
    assert expected.std() > 0.1
    np.testing.assert_allclose(array(block(tokens)), expected, rtol=0, atol=1e-9)


def test_the_first_prediction_depends_on_the_last_start_tokens():
    block, tokens = block_of("released", ("row",)), tokens_of(1)
    before = block(tokens)[0]
    assert len(block.start[0]) == int(1.5 * M)
    with torch.no_grad():
        block.start[0, len(block.start[0]) - M + 1, 0] += 1  # where token 1 is predicted
    changed = (block(tokens)[0] - before).abs().sum(dim=-1) > 1e-9
    assert changed.tolist() == [False] + [True] * (GRID * GRID - 1)


def test_step_sizes_and_decays_start_as_in_mamba():
    torch.manual_seed(0)
    block = StateSpaceBlock(DIM, GRID, M, DIRECTIONS, PRESETS["released"])
    step = F.softplus(block.step_bias.detach().double())
    assert 1e-3 * 0.999 < step.min() < 2e-3
    assert 0.05 < step.max() < 0.1 * 1.001
    np.testing.assert_allclose(array(block.log_decay.exp())[2, 5], np.arange(1, 7), rtol=1e-6)
    assert (block.states, block.rank) == (math.ceil(DIM / 6), math.ceil(DIM / 16))


def test_released_block_of_the_small_encoder_has_the_counted_parameters():
    """2.81 M and, with the linear adapter, 2.96 M for each hierarchy of 384 channels."""
    block = StateSpaceBlock(384, 36, 144, DIRECTIONS, PRESETS["released"])
    assert (block.states, block.rank) == (64, 24)
    count = sum(parameter.numel() for parameter in block.parameters())
    by_hand = 384 * 4 * 384 + 768 * 384 + 8 * 384**2 + 5 * 384 + 4 * 384  # projections, MLP with biases, two norms
    by_hand += 4 * ((24 + 128) * 768 + 768 * 24 + 768 + 768 * 64 + 768) + 2 * 768
    assert count == by_hand
    assert round(count / 1e6, 2) == 2.81


@pytest.mark.parametrize("distance", [0, GRID * GRID])
def test_a_distance_that_leaves_nothing_is_refused(distance):
    with pytest.raises(ValueError, match=f"distance {distance}"):
        StateSpaceBlock(DIM, GRID, distance, DIRECTIONS, PRESETS["paper"])


def detector_of(encoder, **options) -> VarAD:
    torch.manual_seed(0)
    return VarAD(encoder, VarADOptions(**{"m": 1, **options}))


def images_of(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, GRID * 14, GRID * 14, generator=torch.Generator().manual_seed(3))


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)


@pytest.mark.parametrize("loss", ["released", "l2"])
def test_loss_and_map_follow_their_formulas(encoder, loss):
    detector = detector_of(encoder, hierarchies=(1, 3)).eval()
    detector.train_with(VarADTraining(loss=loss))
    features = detector.encode(images_of())
    expected_loss, errors = 0.0, []
    for hierarchy, adapter, block in zip((1, 3), detector.adapters, detector.decoder, strict=True):
        tokens = array(features[:, :, hierarchy - 1])
        adapted = tokens @ array(adapter.phi.weight).T + array(adapter.phi.bias) + tokens
        target = adapted / np.linalg.norm(adapted, axis=-1, keepdims=True)
        predicted = array(block(torch.tensor(target).float()))
        predicted = predicted / np.linalg.norm(predicted, axis=-1, keepdims=True)
        errors.append(1 - cosine(target, predicted))
        if loss == "l2":
            expected_loss += ((target - predicted) ** 2).sum(-1).mean()
        else:
            along_positions = cosine(target.transpose(0, 2, 1), predicted.transpose(0, 2, 1))
            expected_loss += errors[-1].mean() + (1 - along_positions).mean()
    value, parts = detector.training_loss(images_of())
    assert value.item() == pytest.approx(expected_loss, abs=2e-5)
    assert parts.keys() == {"prediction", "variance_1", "variance_3"}
    maps = detector.anomaly_map(images_of())
    mean = torch.tensor(np.stack(errors, 1).reshape(2, 2, GRID, GRID))
    expected = F.interpolate(mean, size=(GRID * 14,) * 2, mode="bilinear", align_corners=True).mean(1)
    np.testing.assert_allclose(array(maps), expected.numpy(), rtol=0, atol=1e-5)


def test_features_are_three_taps_after_the_final_norm(encoder):
    vit, images = encoder.vit, images_of()
    tokens = vit._pos_embed(vit.patch_embed(images))
    expected = []
    for index, block in enumerate(vit.blocks):
        tokens = block(tokens)
        if index in (2, 5, 9):
            expected.append(vit.norm(tokens)[:, 1:])
    found = detector_of(encoder).encode(images)
    torch.testing.assert_close(found, torch.stack(expected, 2), rtol=0, atol=1e-5)


def test_cached_features_and_images_give_the_same_loss(encoder):
    detector = detector_of(encoder)
    assert detector.training_loss(images_of())[0] == detector.training_loss(detector.encode(images_of()))[0]


@pytest.mark.parametrize("detached", [False, True])
def test_detach_target_keeps_the_target_out_of_the_gradient(encoder, detached):
    """With predictions that do not depend on the adapter, only the target can give it a gradient."""
    detector = detector_of(encoder, adapter="linear", hierarchies=(2,))
    detector.train_with(VarADTraining(detach_target=detached))
    constant = torch.randn(2, GRID * GRID, DIM, generator=torch.Generator().manual_seed(5))
    detector.decoder[0].forward = lambda tokens, backend: constant.clone().requires_grad_()
    loss, _ = detector.training_loss(images_of())
    loss.backward()
    gradient = detector.adapters[0].phi.weight.grad
    assert (gradient is None) == detached
    assert detached or gradient.abs().sum() > 0


def test_token_variance_by_hand():
    tokens = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    assert token_variance(tokens).item() == 0.5  # 1 and 0


def test_variance_floor_adds_what_is_missing(encoder):
    detector, features = detector_of(encoder), detector_of(encoder).encode(images_of())
    plain, parts = detector.training_loss(features)
    detector.train_with(VarADTraining(variance_floor=1.0))
    floored, _ = detector.training_loss(features)
    missing = sum(max(0.0, 1.0 - parts[f"variance_{hierarchy}"].item()) for hierarchy in (1, 2, 3))
    assert missing > 0
    assert floored.item() == pytest.approx(plain.item() + missing, abs=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_trained_parameter_gets_a_gradient(encoder, adapter):
    detector = detector_of(encoder, adapter=adapter, learn_start=True)
    for change in detector.lora:  # LoRA's first factor has a gradient only once the second is not zero
        nn.init.normal_(change.query_up), nn.init.normal_(change.value_up)
    detector.training_loss(images_of())[0].backward()
    for name, parameter in detector.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) != name.startswith("encoder."), name


def test_lora_changes_queries_and_values_by_its_formula_and_leaves_the_encoder_as_it_was(encoder):
    detector, images = detector_of(encoder, adapter="lora"), images_of()
    before = encoder(images)
    torch.testing.assert_close(detector.encode(images), torch.stack(before, 2), rtol=0, atol=0)  # at first nothing
    generator, changed = torch.Generator().manual_seed(7), copy.deepcopy(encoder)
    for change, block in zip(detector.lora, changed.vit.blocks, strict=True):
        with torch.no_grad():
            for up in (change.query_up, change.value_up):
                up.copy_(0.1 * torch.randn(up.shape, generator=generator))
            block.attn.qkv.weight[:DIM] += change.query_up @ change.query_down
            block.attn.qkv.weight[2 * DIM :] += change.value_up @ change.value_down
    found = detector.encode(images)
    assert (found - torch.stack(before, 2)).abs().max() > 1e-3
    torch.testing.assert_close(found, torch.stack(changed(images), 2), rtol=0, atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(encoder(images), before, strict=True))


def test_a_zero_adapter_is_the_identity(encoder):
    detector, features = detector_of(encoder, zero_init_adapter=True), torch.randn(1, 16, DIM)
    assert torch.equal(detector.adapters[0](features), features)


def test_start_tokens_are_part_of_the_checkpoint(encoder):
    first, second = detector_of(encoder), VarAD(encoder, VarADOptions(m=1))
    assert not torch.equal(first.decoder[0].start, second.decoder[0].start)
    second.load_trained_state(first.trained_state())
    assert torch.equal(first.eval().anomaly_map(images_of()), second.eval().anomaly_map(images_of()))


def test_standardised_maps_are_relative_to_the_usual_error(encoder):
    detector = detector_of(encoder, standardise=True).eval()
    batches = [images_of(3), torch.randn(2, 3, 56, 56)]
    errors = torch.cat([detector.errors(images) for images in batches]).detach()
    detector.calibrate(batches)
    standardised = (errors[:3] - errors.mean(0)) / (
        errors.std(0, correction=0) + errors.std(0, correction=0).mean(1, keepdim=True)
    )
    expected = F.interpolate(standardised.unflatten(-1, (GRID, GRID)), size=(56, 56), mode="bilinear", align_corners=True).mean(
        1
    )
    torch.testing.assert_close(detector.anomaly_map(images_of(3)), expected, rtol=0, atol=1e-5)


def test_decay_spares_vectors_and_the_scan(encoder):
    detector = detector_of(encoder)
    without = {id(parameter) for parameter in detector.parameters_without_decay()}
    names = {name.split(".", 2)[2] for name, value in detector.named_parameters() if id(value) in without}
    assert names == {
        "step_bias", "log_decay", "skip", "norm1.weight", "norm1.bias", "scan_norm.weight", "scan_norm.bias",
        "norm2.weight", "norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias", "phi.bias",
    }  # fmt: skip


@pytest.mark.parametrize(("m", "next_n", "expected"), [(4, None, [144] * 3), (1.5, None, [54] * 3), (4, 256, [256, 128, 64])])
def test_distances_at_504(m, next_n, expected):
    options = VarADOptions(m=m, pred_next_n=next_n)
    assert [options.distance(hierarchy, 36) for hierarchy in (1, 2, 3)] == expected


@pytest.mark.parametrize(("preset", "states"), [("released", 64), ("paper", 16)])
def test_counted_cost_of_the_small_encoder_at_1022_pixels(preset, states):
    """The authors' 8.88 M trained parameters of the release; MACs by the shapes, the shared projection once."""
    encoder = build_encoder_without_weights("dinov2_vit_small_14", 1022, "random weights", "", 22_056_576, "thirds")
    table = cost_table(VarAD(encoder, VarADOptions(preset=preset)), 1022)
    tokens, starts, distance = 73**2, 438, 292
    scanned, dim, inner, rank = starts + tokens - distance, 384, 768, 24
    projections = (tokens + 4 * starts) * dim * 2 * inner + 4 * tokens * inner * dim
    scan = 4 * scanned * inner * (rank + 2 * states + rank + 2 * states)
    scan += 4 * scanned * inner * 4 if preset == "paper" else 0  # convolution
    assert table["decoder projections"].macs == 3 * projections
    assert table["decoder scan"].macs == 3 * scan
    assert table["adapters"].macs == 3 * tokens * dim**2
    if preset == "released":
        assert table["decoder MLP"].macs == 3 * 4 * tokens * 8 * dim**2
        assert round(table["decoder side"].parameters / 1e6, 2) == 8.88
        assert round(table["with unused blocks"].parameters / 1e6, 1) == 30.9
