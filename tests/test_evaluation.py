"""The evaluation protocol: resizing, smoothing, image score, mask rule, and what happens when a map or memory fails."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from common.errors import NumericError
from models.detector import Detector
from utils.arguments import base_parser, parse
from utils.categories import ModelData
from utils.evaluation import calibrate_scale, evaluate
from utils.hosts import INP_FORMER
from utils.protocol import EvaluationOptions, binary_mask, gaussian_kernel, image_score, smoothed_map
from utils.results import calibrations_of
from utils.settings import settings_of

PUBLISHED = EvaluationOptions()
PLAIN = EvaluationOptions(smoothing_kernel=0)
VARAD = EvaluationOptions(
    mask_threshold=0.0, smoothing_kernel=33, smoothing_sigma=4.0, max_ratio=0.0, metric_size=0, smoothing_border="reflect"
)


class FirstChannel(Detector):
    """A detector whose anomaly map is the first channel of the image."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Identity()
        self.weight = nn.Parameter(torch.ones(()))
        self.batch_sizes = []

    def encode(self, images: Tensor) -> Tensor:
        return images

    def training_loss(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.weight, {}

    def anomaly_map(self, inputs: Tensor) -> Tensor:
        self.batch_sizes.append(len(inputs))
        return inputs[:, 0]


class SmallMemory(FirstChannel):
    """Has memory for `limit` images at a time."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit
        self.activations = []
        self.leftovers = []  # activations of earlier calls that still live, per call

    def anomaly_map(self, inputs: Tensor) -> Tensor:
        self.leftovers.append(sum(activation() is not None for activation in self.activations))
        activation = inputs * 2
        self.activations.append(weakref.ref(activation))
        if len(inputs) > self.limit:
            raise torch.OutOfMemoryError("no memory")
        return super().anomaly_map(inputs)


def records(count: int = 5, side: int = 56) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(3, side, side, generator=generator),
            "mask": (torch.rand(1, side, side, generator=generator) > 0.9).float() * (index % 2),
            "label": index % 2,
            "path": f"folder/{index}.png",
            "item": "bottle",
            "has_pixel_truth": index != 3,
        }
        for index in range(count)
    ]


def run(detector: Detector, data: list[dict], options: EvaluationOptions = PUBLISHED, batch_size: int = 2):
    return evaluate(detector, data, options, batch_size, num_workers=0, precision="fp32", item="bottle")


def slow_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear with pixel centres at halves: linear in each direction, constant beyond the outer centres."""
    for _ in range(2):
        centres = (np.arange(size) + 0.5) * len(image) / size - 0.5
        columns = [np.interp(centres, np.arange(len(image)), column) for column in image.T]
        image = np.array(columns)  # transposed on the way, twice
    return image


def slow_kernel(size: int, sigma: float) -> np.ndarray:
    kernel = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            squared = (row - size // 2) ** 2 + (column - size // 2) ** 2
            kernel[row, column] = np.exp(-squared / (2 * sigma**2))
    return kernel / kernel.sum()


def test_the_defaults_are_the_papers():
    assert EvaluationOptions() == EvaluationOptions(
        mask_threshold=0.5, smoothing_kernel=5, smoothing_sigma=4.0, max_ratio=0.01, pro_mode="exact"
    )


def test_image_score_is_the_mean_of_the_largest_655_pixels():
    maps = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    expected = np.sort(maps.double().numpy().reshape(3, -1), axis=1)[:, -655:].mean(axis=1)
    np.testing.assert_allclose(image_score(maps, 0.01).numpy(), expected, rtol=1e-5)


def test_image_score_counts_exactly_655_pixels():
    maps = torch.zeros(2, 256, 256)
    maps[0].view(-1)[:655] = 1.0
    maps[1].view(-1)[:654] = 655.0
    assert image_score(maps, 0.01).tolist() == pytest.approx([1.0, 654.0])


@pytest.mark.parametrize("max_ratio", [0.0, 1e-6])
def test_image_score_is_the_maximum_for_ratio_zero_and_for_less_than_a_pixel(max_ratio):
    maps = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(image_score(maps, max_ratio), maps.amax(dim=(1, 2)))


@pytest.mark.parametrize(("size", "sigma"), [(5, 4.0), (3, 1.0), (7, 2.5)])
def test_gaussian_kernel_follows_its_formula(size, sigma):
    kernel = gaussian_kernel(size, sigma)
    assert kernel.shape == (1, 1, size, size)
    np.testing.assert_allclose(kernel[0, 0].numpy(), slow_kernel(size, sigma), rtol=1e-6)


@pytest.mark.parametrize("side", [56, 392, 256])
def test_smoothed_map_is_bilinear_then_gaussian_with_zero_padding(side):
    maps = np.random.default_rng(side).random((2, side, side))
    smoothed = smoothed_map(torch.from_numpy(maps).float(), PUBLISHED)
    for image, result in zip(maps, smoothed.numpy(), strict=True):
        expected = ndimage.correlate(slow_resize(image, 256), slow_kernel(5, 4.0), mode="constant", cval=0.0)
        np.testing.assert_allclose(result, expected, atol=2e-6)


def test_smoothing_darkens_two_pixels_of_the_border():
    smoothed = smoothed_map(torch.ones(1, 56, 56), PUBLISHED)[0]
    kernel = slow_kernel(5, 4.0)
    assert smoothed[2:-2, 2:-2].numpy() == pytest.approx(1.0, abs=1e-6)
    assert smoothed[0, 0] == pytest.approx(kernel[2:, 2:].sum(), abs=1e-6)
    assert smoothed[128, -1] == pytest.approx(kernel[:, :3].sum(), abs=1e-6)
    assert smoothed[-2, 128] == pytest.approx(kernel[:4, :].sum(), abs=1e-6)


def test_no_smoothing_leaves_the_resized_map():
    maps = np.random.default_rng(0).random((1, 70, 70))
    smoothed = smoothed_map(torch.from_numpy(maps).float(), PLAIN)
    np.testing.assert_allclose(smoothed[0].numpy(), slow_resize(maps[0], 256), atol=2e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("side", [56, 392])
def test_mask_is_nearest_then_above_the_threshold(side, threshold):
    grey = np.random.default_rng(side).choice([0.0, 0.25, 0.5, 0.500001, 1.0], (2, 1, side, side)).astype(np.float32)
    nearest = np.arange(256) * side // 256
    expected = grey[:, 0][:, nearest][:, :, nearest] > threshold
    result = binary_mask(torch.from_numpy(grey), EvaluationOptions(mask_threshold=threshold))
    assert result.dtype == torch.bool
    np.testing.assert_array_equal(result.numpy(), expected)


def reflected(index: int, size: int) -> int:
    """Where scipy's reflect reads beyond a border: d c b a | a b c d | d c b a."""
    index %= 2 * size
    return index if index < size else 2 * size - 1 - index


def slow_reflected_gaussian(image: np.ndarray, radius: int, sigma: float) -> np.ndarray:
    """Gaussian of one axis after the other in float64, tap by tap."""
    weights = {offset: np.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-radius, radius + 1)}
    for _ in range(2):
        size = len(image)
        rows = [
            sum(weight * image[reflected(row + offset, size)] for offset, weight in weights.items()) / sum(weights.values())
            for row in range(size)
        ]
        image = np.array(rows).T
    return image


@pytest.mark.parametrize(("side", "kernel", "sigma"), [(56, 33, 4.0), (17, 5, 2.0), (16, 41, 4.0)])
def test_reflected_smoothing_of_maps_at_their_own_size(side, kernel, sigma):
    maps = np.random.default_rng(side).random((2, side, side)).astype(np.float32)
    options = replace(VARAD, smoothing_kernel=kernel, smoothing_sigma=sigma)
    smoothed = smoothed_map(torch.from_numpy(maps), options)
    assert smoothed.dtype == torch.float32
    for image, result in zip(maps.astype(np.float64), smoothed.numpy(), strict=True):
        np.testing.assert_allclose(result, slow_reflected_gaussian(image, kernel // 2, sigma), atol=2e-6)


def test_a_reflected_border_is_not_darkened():
    smoothed = smoothed_map(torch.ones(1, 40, 40), VARAD)
    np.testing.assert_allclose(smoothed.numpy(), 1.0, atol=1e-6)


def test_varads_maps_are_those_of_its_release():
    """There the Gaussian has scipy's own radius, 4 sigma."""
    maps = np.random.default_rng(0).random((2, 70, 70)).astype(np.float32)
    expected = np.stack([ndimage.gaussian_filter(image, sigma=4) for image in maps])
    smoothed = smoothed_map(torch.from_numpy(maps), VARAD)
    np.testing.assert_array_equal(smoothed.numpy(), expected)
    np.testing.assert_array_equal(image_score(smoothed, VARAD.max_ratio).numpy(), expected.max(axis=(1, 2)))


@pytest.mark.parametrize("size", [16, 100, 300])
def test_maps_and_masks_have_the_metric_size(size):
    generator = np.random.default_rng(size)
    maps, grey = generator.random((2, 70, 70)), generator.random((2, 1, 70, 70)).astype(np.float32)
    options = replace(PLAIN, metric_size=size)
    for image, result in zip(maps, smoothed_map(torch.from_numpy(maps).float(), options).numpy(), strict=True):
        np.testing.assert_allclose(result, slow_resize(image, size), atol=2e-5)  # float32 positions
    nearest = np.arange(size) * 70 // size
    masks = binary_mask(torch.from_numpy(grey), options)
    np.testing.assert_array_equal(masks.numpy(), grey[:, 0][:, nearest][:, :, nearest] > 0.5)


def test_maps_and_masks_of_the_crop_are_kept_as_they_are():
    generator = torch.Generator().manual_seed(0)
    maps, grey = torch.rand(2, 70, 70, generator=generator), torch.rand(2, 1, 70, 70, generator=generator)
    options = replace(PLAIN, metric_size=0)
    assert torch.equal(smoothed_map(maps, options), maps)
    assert torch.equal(binary_mask(grey, options), grey[:, 0] > 0.5)
    assert [options.map_side(70), PLAIN.map_side(70)] == [70, 256]


def test_the_protocols_in_words():
    assert PUBLISHED.describe() == (
        "maps at 256x256; smoothing: Gaussian 5x5, sigma 4, zeros beyond the border; image score: mean of the top 1.0% of "
        "pixels; mask: > 0.5; AUPRO: exact up to FPR 0.3; P-AP: exact, step-wise"
    )
    assert VARAD.describe() == (
        "maps at the crop's size; smoothing: Gaussian 33x33, sigma 4, reflected at the border; image score: maximum pixel; "
        "mask: > 0; AUPRO: exact up to FPR 0.3; P-AP: exact, step-wise"
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluate_returns_every_image_in_order(batch_size):
    data = records()
    evaluation = run(FirstChannel(), data, batch_size=batch_size)
    images = torch.stack([record["image"][0] for record in data])
    maps = smoothed_map(images, PUBLISHED)
    assert evaluation.paths == [f"folder/{index}.png" for index in range(5)]
    assert evaluation.labels.tolist() == [0, 1, 0, 1, 0]
    assert evaluation.has_pixel_truth.tolist() == [True, True, True, False, True]
    assert evaluation.maps.shape == evaluation.masks.shape == (5, 256, 256)
    assert evaluation.maps.dtype == np.float32
    assert evaluation.masks.dtype == bool
    np.testing.assert_allclose(evaluation.maps, maps.numpy(), atol=1e-6)
    np.testing.assert_allclose(evaluation.scores, image_score(maps, 0.01).numpy(), rtol=1e-6)
    nearest = np.arange(256) * 56 // 256
    for record, mask in zip(data, evaluation.masks, strict=True):
        np.testing.assert_array_equal(mask, record["mask"][0].numpy()[nearest][:, nearest] == 1)
    assert evaluation.mean_gate is None


def test_evaluation_at_the_crops_size():
    data = records()
    evaluation = run(FirstChannel(), data, VARAD)
    images = np.stack([record["image"][0].numpy() for record in data])
    expected = np.stack([ndimage.gaussian_filter(image, sigma=4) for image in images])
    np.testing.assert_array_equal(evaluation.maps, expected)
    np.testing.assert_array_equal(evaluation.scores, expected.max(axis=(1, 2)))
    np.testing.assert_array_equal(evaluation.masks, np.stack([record["mask"][0].numpy() == 1 for record in data]))


@pytest.mark.parametrize(("largest", "step"), [(100, 1), (56, 1), (55, 2), (28, 2), (27, 3)])
def test_of_thinned_maps_evenly_spaced_rows_and_columns_are_kept(largest, step):
    whole, data = run(FirstChannel(), records(), VARAD), records()
    thinned = evaluate(FirstChannel(), data, VARAD, 2, 0, "fp32", "bottle", largest)
    assert thinned.maps.shape[1:] == thinned.masks.shape[1:] == (len(range(0, 56, step)),) * 2
    np.testing.assert_array_equal(thinned.maps, whole.maps[:, ::step, ::step])
    np.testing.assert_array_equal(thinned.masks, whole.masks[:, ::step, ::step])
    np.testing.assert_array_equal(thinned.scores, whole.scores)
    assert thinned.paths == whole.paths


def test_evaluation_leaves_out_images_without_pixel_truth_from_pixel_metrics():
    data = records()
    evaluation = run(FirstChannel(), data, PLAIN)
    without = run(FirstChannel(), [record for record in data if record["has_pixel_truth"]], PLAIN)
    first, second = evaluation.metrics("exact"), without.metrics("exact")
    assert (first.pixel_auroc, first.pixel_ap, first.aupro) == (second.pixel_auroc, second.pixel_ap, second.aupro)
    assert first.image_ap != second.image_ap


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_map_that_is_not_finite_is_an_error_that_names_the_image(value):
    data = records()
    data[3]["image"][0, 20, 30] = value
    with pytest.raises(NumericError, match=r"folder/3\.png"):
        run(FirstChannel(), data)


def test_too_large_a_batch_is_halved_until_it_fits():
    data = records(7)
    plenty, little = FirstChannel(), SmallMemory(limit=2)
    expected, halved = run(plenty, data, batch_size=7), run(little, data, batch_size=7)
    assert plenty.batch_sizes == [7]
    assert max(little.batch_sizes) <= 2
    assert sum(little.batch_sizes) == 7
    np.testing.assert_array_equal(halved.maps, expected.maps)
    np.testing.assert_array_equal(halved.scores, expected.scores)
    assert halved.paths == expected.paths


def test_the_failed_batch_is_forgotten_before_the_halves_are_tried():
    """A failed attempt whose tensors still live would take the memory that the halves need."""
    detector = SmallMemory(limit=2)
    run(detector, records(4), batch_size=4)
    assert detector.leftovers == [0, 0, 0]


def test_one_image_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        run(SmallMemory(limit=0), records(2))


def test_scale_of_normal_images():
    evaluation = run(FirstChannel(), records(), PLAIN)
    scale = calibrate_scale(evaluation)
    ordered = np.sort(evaluation.maps, axis=None).astype(float)
    assert scale["map_median"] == pytest.approx(ordered[len(ordered) // 2], abs=1e-5)
    assert scale["map_limit"] == pytest.approx(ordered[int(0.999 * len(ordered))], abs=1e-5)
    assert scale["scores"] == sorted(evaluation.scores.tolist())


def test_scale_at_another_quantile():
    evaluation = run(FirstChannel(), records(), PLAIN)
    scale = calibrate_scale(evaluation, 0.95)
    ordered = np.sort(evaluation.maps, axis=None).astype(float)
    assert scale["map_limit"] == pytest.approx(ordered[int(0.95 * len(ordered))], abs=1e-5)


def test_scale_of_large_maps_is_that_of_an_even_grid():
    flags = ["--data_path", "data", "--metric_size", "512", "--smoothing_kernel", "0", "--num_workers", "0"]
    settings = settings_of(parse(base_parser("", INP_FORMER, ["single"]), flags))
    model, data = ModelData("bottle", [], one_of_many=True, variants=1), records()
    scale = calibrations_of(settings, FirstChannel(), {"bottle": data}, model)["calibration"]
    whole = run(FirstChannel(), data, replace(PLAIN, metric_size=512))
    assert scale == calibrate_scale(replace(whole, maps=whole.maps[:, ::2, ::2]))
    assert scale["map_limit"] == pytest.approx(calibrate_scale(whole)["map_limit"], abs=1e-3)


def test_part_of_an_evaluation_is_that_of_its_images():
    data = records()
    part, alone = run(FirstChannel(), data).part(slice(1, 4)), run(FirstChannel(), data[1:4])
    assert part.paths == alone.paths
    for name in ("labels", "scores", "maps", "masks", "has_pixel_truth"):
        np.testing.assert_array_equal(getattr(part, name), getattr(alone, name))


def test_no_images_have_an_empty_evaluation():
    evaluation = run(FirstChannel(), [])
    assert (evaluation.paths, evaluation.mean_gate) == ([], None)
    assert evaluation.maps.shape == evaluation.masks.shape == (0, 256, 256)
    assert not run(FirstChannel(), [], VARAD).maps.size
