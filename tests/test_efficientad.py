"""EfficientAD's networks, losses and maps against their formulas, and who learns from what."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as transforms

import models.efficientad
from common.errors import NumericError
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from models.efficientad import EfficientAD, EfficientADOptions, EfficientADTraining, hard_feature_loss, jittered
from models.patch_description import TEACHER_CHANNELS, Autoencoder, FrozenTeacher, PatchDescriptionNetwork, map_side

SIDE, CHANNELS = 64, TEACHER_CHANNELS["tiny"]
WITH_AND_WITHOUT_PADDING = pytest.mark.parametrize("padding", [False, True])


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def images_of(number: int = 2, side: int = SIDE, seed: int = 0) -> torch.Tensor:
    colours = torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return transforms.normalize(colours, list(IMAGENET_MEAN), list(IMAGENET_STD))


def detector_of(padding: bool = False, **options) -> EfficientAD:
    torch.manual_seed(0)
    teacher = FrozenTeacher(PatchDescriptionNetwork("tiny", CHANNELS, padding), "random weights", "0")
    return EfficientAD(teacher, EfficientADOptions(padding=padding, **options), SIDE)


def prepared(detector: EfficientAD) -> EfficientAD:
    detector.prepare(lambda: [images_of(3, seed=1), images_of(2, seed=2)])
    return detector


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize(
    ("size", "teacher", "student"),
    [
        ("small", 2_694_144, 4_267_392),
        # 256 * 49 + 512 * 4097 + 512 * 513 + 512 * 4609 + C * 8193 + C * (C + 1), C = 384 and 768
        ("medium", 8_026_624, 11_615_488),
    ],
)
def test_parameters_of_teacher_and_student(size, teacher, student):
    with torch.device("meta"):
        networks = [PatchDescriptionNetwork(size, factor * TEACHER_CHANNELS[size]) for factor in (1, 2)]
    assert [count(network) for network in networks] == [teacher, student]


def test_parameters_of_the_autoencoder():
    with torch.device("meta"):
        autoencoder = Autoencoder(256, 384, 56)
    assert count(autoencoder) == 1_096_320
    assert len(autoencoder.convolutions) == 14


@pytest.mark.parametrize("size", ["small", "medium", "tiny"])
def test_a_map_has_a_quarter_of_the_images_side_and_without_padding_8_less(size):
    for side in range(33, 521):
        assert map_side(size, side, padding=True) == math.ceil(side / 4)
        assert map_side(size, side, padding=False) == math.ceil(side / 4) - 8
    with pytest.raises(ValueError, match="32 x 32"):
        map_side(size, 32, padding=False)


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize(("padding", "expected"), [(False, 56), (True, 64)])
def test_every_network_gives_the_published_map_of_256_pixels(size, padding, expected):
    with torch.device("meta"):
        network, images = PatchDescriptionNetwork(size, 384, padding), torch.empty(1, 3, 256, 256)
        assert network(images).shape == (1, 384, expected, expected)
        assert Autoencoder(256, 384, expected).eval()(images).shape == (1, 384, expected, expected)


@WITH_AND_WITHOUT_PADDING
@pytest.mark.parametrize("side", [33, 64, 96, 100, 128, 200])
def test_networks_agree_on_the_side_for_other_images(padding, side):
    images, expected = images_of(1, side), map_side("tiny", side, padding)
    assert PatchDescriptionNetwork("tiny", 5, padding)(images).shape == (1, 5, expected, expected)
    assert Autoencoder(side, 5, expected, width=8)(images).shape == (1, 5, expected, expected)


def plain_network(network: PatchDescriptionNetwork, images: torch.Tensor, paddings: list[int]) -> list[torch.Tensor]:
    """Each convolution's output before its ReLU, in float64; the last one is the network's."""
    outputs = []
    for index, (name, padding) in enumerate(zip(dict(network.named_children()), paddings, strict=True)):
        layer = getattr(network, name)
        if index:
            images = F.relu(outputs[-1])
        if index in (1, 2):
            images = F.avg_pool2d(images, 2, 2, padding=int(network.padding))
        outputs.append(F.conv2d(images, layer.weight.double(), layer.bias.double(), padding=padding))
    return outputs


@WITH_AND_WITHOUT_PADDING
@pytest.mark.parametrize(("size", "paddings"), [("tiny", [3, 3, 1, 0]), ("medium", [3, 3, 0, 1, 0, 0])])
def test_patch_description_network_follows_its_formula(size, paddings, padding):
    torch.manual_seed(0)
    network, images = PatchDescriptionNetwork(size, 6, padding), images_of(1, 40)
    with torch.no_grad():
        expected = plain_network(network, images.double(), [value * padding for value in paddings])
        found = network.layer_outputs(images)
        assert torch.equal(found[-1], network(images))
    assert all((output < 0).any() for output in found)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(array(one), array(other), rtol=0, atol=1e-5)


def test_autoencoder_follows_its_formula():
    torch.manual_seed(0)
    autoencoder, images = Autoencoder(128, 6, 24, width=8).eval(), images_of(2, 128)

    def convolved(maps, name, stride=1, padding=0):
        layer = getattr(autoencoder, name)
        return F.conv2d(maps, layer.weight.double(), layer.bias.double(), stride, padding)

    expected = images.double()
    for index in range(1, 6):
        expected = F.relu(convolved(expected, f"encoder{index}", 2, 1))
    expected = convolved(expected, "encoder6")
    assert expected.shape == (2, 8, 1, 1)
    for index, side in enumerate([1, 4, 7, 16, 31, 63], start=1):
        expected = F.relu(convolved(F.interpolate(expected, (side, side), mode="bilinear"), f"decoder{index}", 1, 2))
    expected = F.relu(convolved(F.interpolate(expected, (24, 24), mode="bilinear"), "decoder7", 1, 1))
    expected = convolved(expected, "decoder8", 1, 1)
    np.testing.assert_allclose(array(autoencoder(images)), array(expected), rtol=0, atol=1e-6)


def test_autoencoder_resizes_as_published_and_drops_a_fifth_in_training():
    with torch.device("meta"):
        assert Autoencoder(256, 384, 56).sides == [3, 8, 15, 32, 63, 127]
    torch.manual_seed(0)
    autoencoder = Autoencoder(SIDE, 6, 8, width=32)
    inputs = []
    autoencoder.decoder2.register_forward_pre_hook(lambda layer, arguments: inputs.append(arguments[0]))
    torch.nn.init.zeros_(autoencoder.decoder1.weight)
    torch.nn.init.ones_(autoencoder.decoder1.bias)
    autoencoder(images_of(32))
    assert set(inputs[0].flatten().tolist()) == {0.0, 1.25}
    assert (inputs[0] == 0).float().mean() == pytest.approx(0.2, abs=0.03)
    autoencoder.eval()(images_of(4))
    assert torch.equal(inputs[1], torch.ones_like(inputs[1]))


def test_the_teacher_stays_as_it_is():
    detector = detector_of().train()
    assert detector.student.training
    assert not detector.encoder.training
    assert not detector.encoder.network.training
    assert not any(parameter.requires_grad for parameter in detector.encoder.parameters())
    assert not detector.encoder(images_of().requires_grad_()).requires_grad
    names = {name.split(".")[0] for name in detector.trained_state()}
    assert names == {"student", "autoencoder", "teacher_mean", "teacher_std", "map_quantiles"}
    assert (detector.encoder.name, detector.encoder.size, detector.encoder.taps) == ("pdn_tiny", "tiny", [])
    assert detector.encoder.published_parameters == count(detector.encoder)


def test_a_teacher_of_another_padding_is_refused():
    teacher = FrozenTeacher(PatchDescriptionNetwork("tiny", CHANNELS, padding=True), "random weights", "0")
    with pytest.raises(ValueError, match="padding=True"):
        EfficientAD(teacher, EfficientADOptions(), SIDE)


def test_a_quantized_teacher_takes_the_place_of_the_frozen_one():
    detector, images = detector_of(), images_of()
    other = PatchDescriptionNetwork("tiny", CHANNELS)
    detector.quantized_teacher = other
    detector.train()
    assert detector.teacher is other
    assert not other.training
    assert torch.equal(detector.teacher_maps(images), other(images))
    assert other.conv1.weight.requires_grad  # and yet:
    assert not detector.teacher_maps(images).requires_grad


def test_teacher_statistics_are_those_of_a_float64_formula():
    detector, batches = detector_of(), [images_of(3, seed=1), 0.5 * images_of(2, seed=2)]
    detector.prepare(lambda: iter(batches))
    maps = np.concatenate([array(detector.encoder(images)) for images in batches])
    np.testing.assert_allclose(array(detector.teacher_mean), maps.mean((0, 2, 3)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(array(detector.teacher_std), maps.std((0, 2, 3)), rtol=1e-5)
    normalised = array(torch.cat([detector.teacher_maps(images) for images in batches]))
    np.testing.assert_allclose(normalised.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(normalised.std((0, 2, 3)), 1, rtol=1e-4)


def test_a_channel_of_the_teacher_that_never_changes_keeps_its_scale():
    detector = detector_of()
    torch.nn.init.zeros_(detector.encoder.network.conv4.weight[5])
    prepared(detector)
    assert detector.teacher_std[5] == 1
    assert detector.teacher_maps(images_of())[:, 5].abs().max() < 1e-6
    assert (detector.teacher_std != 1).sum() == CHANNELS - 1


def test_a_teacher_that_is_not_finite_is_an_error():
    detector = detector_of()
    torch.nn.init.constant_(detector.encoder.network.conv4.bias, torch.inf)
    with pytest.raises(NumericError, match="random weights"):
        prepared(detector)


@pytest.mark.parametrize("elements", [1, 500, 1000, 1001, 5000, 12345])
def test_the_hard_loss_is_the_mean_of_a_thousandth_of_the_elements(elements):
    errors = torch.randperm(elements, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    hard = math.ceil(elements / 1000)
    loss = hard_feature_loss(errors.view(1, 1, 1, -1), 0.999)
    assert loss.item() == pytest.approx(np.arange(elements - hard, elements).mean(), abs=1e-9)
    loss.backward()
    chosen = errors.detach() >= elements - hard
    torch.testing.assert_close(errors.grad, chosen.double() / hard)


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.9, 0.999])
def test_the_hard_loss_takes_what_is_not_below_the_quantile_ties_included(quantile):
    """Of the whole batch, not image by image: the second image's errors are larger."""
    generator = torch.Generator().manual_seed(0)
    errors = torch.randint(50, (2, 4, 20, 20), generator=generator).double() * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    expected = array(errors)[array(errors) >= np.quantile(array(errors), quantile)].mean()
    assert hard_feature_loss(errors, quantile).item() == pytest.approx(expected, abs=1e-9)


def test_the_hard_loss_takes_more_elements_than_torchs_quantile():
    errors = torch.zeros(2**24 + 1)
    errors[7] = 3.0
    assert hard_feature_loss(errors, 1.0).item() == 3.0


def test_jitter_is_exactly_one_of_three_adjustments_per_image():
    images, kinds, factors = images_of(60, side=8), [], []
    colours = images * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    torch.manual_seed(0)
    changed = jittered(images, 0.2) * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    grey = (colours * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    origins = [torch.zeros_like(colours), grey.mean((1, 2, 3), keepdim=True).expand_as(colours), grey.expand_as(colours)]
    for index in range(60):
        free = (changed[index] > 1e-4) & (changed[index] < 1 - 1e-4)  # not cut at 0 or 1
        fits = []
        for kind, origin in enumerate(origins):
            away = (colours - origin)[index]
            factor = ((changed - origin)[index] * away)[free].sum() / away[free].square().sum()
            cut = (origin[index] + factor * away).clamp(0, 1)
            if torch.allclose(cut, changed[index], atol=1e-5) and 0.8 <= factor <= 1.2:
                fits.append(kind)
                factors.append(factor.item())
        assert len(fits) == 1
        kinds += fits
    assert {kind: 10 < kinds.count(kind) < 30 for kind in range(3)} == {0: True, 1: True, 2: True}
    assert min(factors) < 0.83
    assert max(factors) > 1.17
    assert changed.min() >= -1e-6
    assert changed.max() <= 1 + 1e-6


def test_no_jitter_leaves_the_images():
    torch.testing.assert_close(jittered(images_of(), 0.0), images_of(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("with_penalty", [False, True])
def test_loss_follows_its_formula(monkeypatch, with_penalty):
    detector, images, others = prepared(detector_of()).eval(), images_of(2, seed=3), images_of(2, seed=4)
    changed, seen = images_of(2, seed=5), []
    monkeypatch.setattr(models.efficientad, "jittered", lambda images, amount: seen.append((images, amount)) or changed)
    asked = []
    detector.train_with(
        EfficientADTraining(hard_quantile=0.9, jitter=0.3),
        (lambda number: asked.append(number) or others) if with_penalty else None,
    )
    loss, parts = detector.training_loss(images)
    mean, std = array(detector.teacher_mean)[:, None, None], array(detector.teacher_std)[:, None, None]
    teacher = [(array(detector.encoder(batch)) - mean) / std for batch in (images, changed)]
    student = [array(detector.student(batch)) for batch in (images, changed, others)]
    rebuilt = array(detector.autoencoder(changed))
    errors = (teacher[0] - student[0][:, :CHANNELS]) ** 2
    expected = {
        "hard": errors[errors >= np.quantile(errors, 0.9)].mean(),
        "autoencoder": ((teacher[1] - rebuilt) ** 2).mean(),
        "student_autoencoder": ((rebuilt - student[1][:, CHANNELS:]) ** 2).mean(),
    }
    if with_penalty:
        expected["penalty"] = (student[2][:, :CHANNELS] ** 2).mean()
    assert parts == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(sum(expected.values()), rel=1e-4)
    assert seen == [(images, 0.3)]
    assert asked == [2] * with_penalty


def reached_by(part: str) -> tuple[set[str], torch.Tensor]:
    """Which networks a part of the loss gives a gradient, and which of the student's channels, (2, C)."""
    detector = prepared(detector_of())
    detector.train_with(EfficientADTraining(hard_quantile=0.0), lambda number: images_of(number, seed=4))
    detector.losses(images_of())[part].backward()
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters() if parameter.grad is not None}
    reached = {name.split(".")[0] for name, gradient in gradients.items() if gradient.abs().sum() > 0}
    of_student = gradients.get("student.conv4.bias", torch.zeros(2 * CHANNELS))
    return reached, (of_student != 0).unflatten(0, (2, CHANNELS))


@pytest.mark.parametrize("part", ["hard", "penalty", "autoencoder", "student_autoencoder"])
def test_gradients_flow_where_they_must_and_nowhere_else(part):
    networks, (as_teacher, as_autoencoder) = reached_by(part)
    assert (
        networks
        == {
            "hard": {"student"},
            "penalty": {"student"},
            "autoencoder": {"autoencoder"},
            "student_autoencoder": {"student", "autoencoder"},
        }[part]
    )
    assert as_teacher.all() == as_teacher.any() == (part in ("hard", "penalty"))
    assert as_autoencoder.all() == as_autoencoder.any() == (part == "student_autoencoder")


def test_every_trained_parameter_gets_a_gradient():
    detector = prepared(detector_of())
    detector.training_loss(images_of())[0].backward()
    for name, parameter in detector.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) != name.startswith("encoder."), name


def test_the_loss_is_the_same_under_the_same_seed():
    detector, losses = prepared(detector_of()), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(detector.training_loss(images_of())[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_map_quantiles_are_numpys_over_all_values_of_the_small_maps():
    detector, batches = prepared(detector_of()).eval(), [images_of(3, seed=1), images_of(1, seed=2)]
    with torch.no_grad():
        maps = [[array(part) for part in detector.maps(images)] for images in batches]
    assert maps[0][0].shape == maps[0][1].shape == (3, 8, 8)
    expected = [np.quantile(np.concatenate([batch[row] for batch in maps]), [0.9, 0.995]) for row in (0, 1)]
    detector.calibrate(iter(batches))
    np.testing.assert_allclose(array(detector.map_quantiles), expected, rtol=1e-5)


def test_quantiles_of_more_values_than_torch_allows(monkeypatch):
    detector = detector_of()
    values = torch.arange(2**24 + 1).float().view(1, 1, -1) % 1000
    monkeypatch.setattr(detector, "maps", lambda images: (values, values))
    detector.calibrate([images_of()])
    np.testing.assert_allclose(array(detector.map_quantiles), np.quantile(values.numpy(), [0.9, 0.995])[None].repeat(2, 0))


def test_maps_that_are_everywhere_the_same_have_no_scale():
    detector = detector_of()
    for network in (detector.student.conv4, detector.autoencoder.decoder8, detector.encoder.network.conv4):
        torch.nn.init.zeros_(network.weight)
    with pytest.raises(NumericError, match="student"):
        detector.eval().calibrate([images_of()])


@pytest.mark.parametrize("normalisation", ["quantile", "none"])
@WITH_AND_WITHOUT_PADDING
def test_anomaly_map_follows_its_formula(padding, normalisation):
    detector = prepared(detector_of(padding, map_normalisation=normalisation)).eval()
    detector.calibrate([images_of(3, seed=1), images_of(2, seed=2)])
    images = images_of(2, seed=6)
    mean, std = array(detector.teacher_mean)[:, None, None], array(detector.teacher_std)[:, None, None]
    teacher, student = (array(detector.encoder(images)) - mean) / std, array(detector.student(images))
    maps = [
        ((target - student[:, half]) ** 2).mean(1)
        for target, half in ((teacher, slice(0, CHANNELS)), (array(detector.autoencoder(images)), slice(CHANNELS, None)))
    ]
    if normalisation == "quantile":
        maps = [0.1 * (m - low) / (high - low) for m, (low, high) in zip(maps, array(detector.map_quantiles), strict=True)]
    combined = 0.5 * maps[0] + 0.5 * maps[1]
    whole = combined if padding else np.pad(combined, ((0, 0), (4, 4), (4, 4)))
    assert whole.shape == (2, 16, 16)
    expected = np.stack([enlarged(one, SIDE) for one in whole])
    found = detector.anomaly_map(images)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(array(found), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def enlarged(values: np.ndarray, side: int) -> np.ndarray:
    """Bilinear between the centres of pixels, the border's values beyond them."""
    places = ((np.arange(side) + 0.5) * len(values) / side - 0.5).clip(0, len(values) - 1)
    centres = np.arange(len(values))
    rows = np.stack([np.interp(places, centres, column) for column in values.T], axis=1)
    return np.stack([np.interp(places, centres, row) for row in rows])


@pytest.mark.parametrize("side", [97, 100, 128])
def test_the_border_that_no_window_describes_is_zero_in_images_of_any_side(side):
    torch.manual_seed(0)
    teacher = FrozenTeacher(PatchDescriptionNetwork("tiny", CHANNELS), "random weights", "0")
    detector = EfficientAD(teacher, EfficientADOptions(), side).eval()
    width = math.ceil(side / 4)
    places = (np.arange(side) + 0.5) * width / side - 0.5  # of the pixels in the map
    described = (places > 3) & (places < width - 4)
    assert np.array_equal(array(detector.anomaly_map(images_of(1, side))[0]) > 0, np.outer(described, described))


def test_what_was_learned_comes_back_from_a_checkpoint():
    first = prepared(detector_of()).eval()
    first.calibrate([images_of(3, seed=1)])
    second = detector_of().eval()
    before = second.anomaly_map(images_of())
    second.load_trained_state(first.trained_state())
    assert torch.equal(first.anomaly_map(images_of()), second.anomaly_map(images_of()))
    assert not torch.equal(before, second.anomaly_map(images_of()))


def test_images_pass_as_they_are_and_none_is_cached():
    detector, images = detector_of(), images_of()
    assert detector.encode(images) is images
    assert not detector.caches_features
