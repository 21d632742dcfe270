"""Few-shot data: the draw, and the 22 variants against sampling written out pixel by pixel in float64."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from datasets.few_shot import VARIANTS_PER_IMAGE, FewShotDataset, choose_shots, variant
from datasets.mvtec import train_records
from datasets.records import ImageDataset, Record
from tests.miniature import make_mvtec

SIDE = 20  # 0.1 and 0.05 of it are whole pixels
ANGLES = [-45, -33.75, -22.5, -11.25, 11.25, 22.5, 33.75, 45]
OFFSETS = [(0.2, 0.2), (-0.2, 0.2), (-0.2, -0.2), (0.2, -0.2), (0.1, 0.1), (-0.1, 0.1), (-0.1, -0.1), (0.1, -0.1)]


def noise(side: int = SIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (3, side, side))


def variants(image: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(image).float()
    return torch.stack([variant(tensor, number) for number in range(VARIANTS_PER_IMAGE)]).double().numpy()


def records(names, item: str = "bottle", folder: str = "train/good") -> list[Record]:
    return [Record(Path(item, folder, name), 0, item) for name in names]


NAMES = [f"{index:03d}.png" for index in range(30)]


def slow_read(image: np.ndarray, row: float, column: float) -> np.ndarray:
    """Bilinear value of (3, S, S) at a position in pixels, in an image continued by its mirror images."""
    side = image.shape[1]
    mirrored = np.pad(image, ((0, 0), (side, side), (side, side)), mode="symmetric")
    row, column = row + side, column + side
    top, left = math.floor(row), math.floor(column)
    down, right = row - top, column - left
    upper = (1 - right) * mirrored[:, top, left] + right * mirrored[:, top, left + 1]
    lower = (1 - right) * mirrored[:, top + 1, left] + right * mirrored[:, top + 1, left + 1]
    return (1 - down) * upper + down * lower


def slow_sampled(image: np.ndarray, position) -> np.ndarray:
    """Every output pixel reads where `position` sends its centre: (x, y) in -1..1 from the left and upper border."""
    side = image.shape[1]
    result = np.empty_like(image)
    for row in range(side):
        for column in range(side):
            x, y = position((2 * column + 1) / side - 1, (2 * row + 1) / side - 1)
            result[:, row, column] = slow_read(image, ((y + 1) * side - 1) / 2, ((x + 1) * side - 1) / 2)
    return result


@pytest.mark.parametrize(("place", "degrees"), list(enumerate(ANGLES, 1)))
@pytest.mark.parametrize("side", [SIDE, 15])
def test_small_rotations_follow_their_definition(place, degrees, side):
    angle = math.radians(degrees)
    image = noise(side)
    expected = slow_sampled(
        image, lambda x, y: (x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle))
    )
    np.testing.assert_allclose(variants(image)[place], expected, atol=3e-5)


@pytest.mark.parametrize(("place", "offset"), list(enumerate(OFFSETS, 9)))
@pytest.mark.parametrize("side", [SIDE, 14])
def test_translations_follow_their_definition(place, offset, side):
    image = noise(side)
    expected = slow_sampled(image, lambda x, y: (x + offset[0], y + offset[1]))
    np.testing.assert_allclose(variants(image)[place], expected, atol=3e-5)


@pytest.mark.parametrize(("place", "offset"), list(enumerate(OFFSETS, 9)))
def test_a_translation_of_whole_pixels_is_a_slice_of_the_mirrored_image(place, offset):
    columns, rows = (round(value * SIDE / 2) for value in offset)
    mirrored = np.pad(noise(), ((0, 0), (2, 2), (2, 2)), mode="symmetric")
    expected = mirrored[:, 2 + rows : 2 + rows + SIDE, 2 + columns : 2 + columns + SIDE]
    np.testing.assert_allclose(variants(noise())[place], expected, atol=3e-5)


def test_positive_angles_turn_anticlockwise_as_the_quarter_turns_do():
    """A spot right of the centre climbs: 45 degrees bring it up to the diagonal, 90 degrees to the top."""
    image = np.zeros((3, 21, 21))
    image[:, 9:12, 17:20] = 1
    spots = [np.unravel_index(turned[0].argmax(), (21, 21)) for turned in variants(image)]
    centres = [(spot[0] - 10, spot[1] - 10) for spot in spots]
    assert centres[8][0] < -3
    assert centres[8][1] > 3
    assert centres[1][0] > 3
    assert centres[19][0] < -6
    assert abs(centres[19][1]) <= 1


def test_flip_grey_and_right_angles_are_exact():
    image = noise().astype(np.float32).astype(np.float64)
    result = variants(image)
    assert np.array_equal(result[0], image)
    assert np.array_equal(result[17], image[:, :, ::-1])
    for row in range(SIDE):
        for column in range(SIDE):
            assert np.array_equal(result[19][:, SIDE - 1 - column, row], image[:, row, column])
    assert np.array_equal(result[20], image[:, ::-1, ::-1])
    assert np.array_equal(result[21], np.transpose(image, (0, 2, 1))[:, :, ::-1])


def test_grey_is_the_luminance_of_the_normalised_values_in_every_channel():
    image = np.zeros((3, 4, 4))
    image[:, 1, 2] = (1.0, -2.0, 3.0)
    grey = variants(image)[18]
    expected = 0.299 - 2 * 0.587 + 3 * 0.114
    np.testing.assert_allclose(grey[:, 1, 2], expected, atol=1e-6)
    assert np.count_nonzero(grey) == 3


def test_there_are_22_different_variants():
    result = variants(noise())
    assert result.shape == (22, 3, SIDE, SIDE)
    assert VARIANTS_PER_IMAGE == 22
    assert len({one.tobytes() for one in result}) == 22


@pytest.mark.parametrize("seed", range(5))
def test_fewer_shots_are_the_beginning_of_more(seed):
    four = choose_shots(records(NAMES), 4, seed, "bottle")
    assert len(set(four)) == 4
    assert choose_shots(records(NAMES), 1, seed, "bottle") == four[:1]
    assert choose_shots(records(NAMES), 2, seed, "bottle") == four[:2]


def test_the_choice_depends_on_seed_category_and_names_alone():
    chosen = choose_shots(records(NAMES), 4, 1, "bottle")
    shuffled = random.Random(0).sample(records(NAMES), len(NAMES))
    random.seed(5)
    assert choose_shots(shuffled, 4, 1, "bottle") == chosen
    elsewhere = choose_shots(records(NAMES, folder="elsewhere"), 4, 1, "bottle")
    assert [record.path.name for record in elsewhere] == [record.path.name for record in chosen]
    assert choose_shots(records(NAMES), 4, 2, "bottle") != chosen
    assert choose_shots(records(NAMES), 4, 1, "cable") != chosen


def test_a_draw_can_be_repeated_by_hand():
    """Python's generator, one number per file in the order of their names; the smallest numbers win."""
    generator = random.Random("1/bottle")
    numbers = {name: generator.random() for name in sorted(NAMES)}
    expected = sorted(NAMES, key=numbers.get)[:4]
    assert [record.path.name for record in choose_shots(records(NAMES), 4, 1, "bottle")] == expected


def test_every_file_is_drawn_equally_often():
    draws = [choose_shots(records(NAMES[:5]), 2, seed, "bottle") for seed in range(2000)]
    counts = [sum(record.path.name == name for draw in draws for record in draw) for name in NAMES[:5]]
    deviation = math.sqrt(2000 * 0.4 * 0.6)
    assert all(abs(count - 800) < 4 * deviation for count in counts)


def test_more_shots_than_images_are_refused_with_both_numbers():
    assert len(choose_shots(records(NAMES[:4]), 4, 1, "bottle")) == 4
    with pytest.raises(UserError, match=r"bottle has 3 training images.*--shot 4; give --shot 3"):
        choose_shots(records(NAMES[:3]), 4, 1, "bottle")


@pytest.fixture
def images(tmp_path):
    root = make_mvtec(tmp_path / "data", items=("bottle", "cable"), train=2)
    return ImageDataset(train_records(root, "bottle") + train_records(root, "cable"), 64, 56)


def test_the_data_set_has_all_variants_of_the_first_image_first(images):
    data = FewShotDataset(images)
    assert len(data) == len(data.records) == 4 * 22
    for source in range(4):
        for number in range(22):
            item = data[22 * source + number]
            assert torch.equal(item["image"], variant(images.image(source), number))
            assert item["path"] == str(data.records[22 * source + number].path) == images[source]["path"]
            assert item.keys() == images[source].keys()
    assert (data[50]["item"], data[50]["label"], data[50]["mask"].shape) == ("cable", 0, (1, 56, 56))
    assert (data.input_size, data.crop_size) == (64, 56)
    assert data.identity == {"augmentation": "few-shot-22", "version": 1}


def test_an_image_is_read_once_and_is_not_changed_by_its_users(images, monkeypatch):
    data = FewShotDataset(images)
    read = []
    monkeypatch.setattr(images, "image", lambda index: read.append(index) or torch.ones(3, 56, 56))
    for number in range(22):
        data.image(22 + number).zero_()
    assert read == [1]
    assert torch.equal(data.image(22), torch.ones(3, 56, 56))


def test_loader_workers_give_the_same_numbers(images):
    here, there = ([batch["image"] for batch in DataLoader(FewShotDataset(images), 8, num_workers=n)] for n in (0, 2))
    assert torch.equal(torch.cat(here), torch.cat(there))
