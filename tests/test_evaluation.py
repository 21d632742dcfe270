"""The evaluation protocol: resizing, smoothing, image score, mask rule, and what happens when a map or memory fails."""

import weakref

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from common.errors import NumericError
from models.detector import Detector
from utils.evaluation import calibrate_scale, evaluate
from utils.protocol import EvaluationOptions, binary_mask, gaussian_kernel, image_score, smoothed_map

PUBLISHED = EvaluationOptions()
PLAIN = EvaluationOptions(smoothing_kernel=0)


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
    result = binary_mask(torch.from_numpy(grey), threshold)
    assert result.dtype == torch.bool
    np.testing.assert_array_equal(result.numpy(), expected)


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
