"""Synthetic buttons: what is where, that masks mark what the defect changed, and that nothing but the seed matters."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import label

from datasets.button_defects import DEFECTS, with_defect
from datasets.buttons import KINDS, button
from datasets.catalog import LAYOUTS, ListingOptions, data_sources
from datasets.check import record_faults
from datasets.images import DEFAULT_MAX_PIXELS
from scripts import make_buttons

SIDE = 192


def made(folder, *, side=64, train=2, good=1, defective=6, classes=4, seed=1) -> dict[str, bytes]:
    """Files of a data set by their path in it."""
    counts = ["--train", str(train), "--test_good", str(good), "--test_defective", str(defective)]
    flags = ["--image_size", str(side), "--classes", str(classes), "--seed", str(seed)]
    assert make_buttons.main(["--output", str(folder), *counts, *flags]) == 0
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.abs(first.astype(int) - second).max(axis=2)


@pytest.mark.parametrize("item", KINDS)
@pytest.mark.parametrize("defect", DEFECTS)
def test_the_mask_marks_what_the_defect_changed(item, defect):
    good = button(np.random.default_rng(0), KINDS[item], SIDE)
    image, mask = with_defect(np.random.default_rng(0), KINDS[item], SIDE, defect)
    changed = difference(good, image)
    assert not changed[~mask].any()
    assert 0.0005 <= mask.mean() <= 0.01
    assert np.mean(changed[mask] > 0) > 0.9  # the rest are narrow gaps
    assert np.percentile(changed[mask], 90) >= 15  # grey levels: visible above the noise


def test_good_buttons_are_alike_and_never_the_same():
    for kind in KINDS.values():
        first, second = (button(np.random.default_rng(seed), kind, SIDE) for seed in (1, 2))
        assert first.shape == (SIDE, SIDE, 3)
        assert first.dtype == np.uint8
        assert np.abs(first.mean(axis=(0, 1)) - second.mean(axis=(0, 1))).max() < 8
        assert np.mean(difference(first, second) > 2) > 0.3


@pytest.mark.parametrize("item", KINDS)
def test_a_button_has_its_holes_and_a_blocked_one_is_missing(item):
    kind = replace(KINDS[item], background=(0, 0, 0))
    for seed in range(2):
        good = button(np.random.default_rng(seed), kind, SIDE)
        blocked, _ = with_defect(np.random.default_rng(seed), kind, SIDE, "blocked_hole")
        black = [label(image.max(axis=2) < 60)[0] for image in (good, blocked)]
        assert [parts.max() for parts in black] == [1 + kind.holes, kind.holes]  # what lies around the button is one
        border = np.concatenate([black[0][0], black[0][-1], black[0][:, 0], black[0][:, -1]])
        assert set(border) == {1}
        areas = np.bincount(black[0].ravel())[2:] / SIDE**2
        assert areas == pytest.approx(np.pi * (0.375 * kind.hole_radius) ** 2, rel=0.25)


def test_the_folder_layout_reads_every_class(tmp_path):
    made(tmp_path / "buttons")
    (source,) = data_sources("Folder", [str(tmp_path / "buttons")])
    layout, options = LAYOUTS["Folder"], ListingOptions()
    assert layout.categories(source.root) == list(KINDS)
    for item in KINDS:
        train, test = layout.train(source.root, item, options), layout.test(source.root, item, options)
        assert [len(train), len(test), sum(record.label for record in test)] == [2, 7, 6]
        assert {record.path.parent.name for record in test} == {"good", *DEFECTS}
        for record in (*train, *test):
            assert record_faults(record, DEFAULT_MAX_PIXELS) == ([], [])
            assert Image.open(record.path).size == (64, 64)
            assert len(record.masks) == record.label
        assert not layout.stray_masks(source.root, item, options)


def test_the_same_seed_gives_the_same_bytes_whatever_the_counts(tmp_path):
    few = made(tmp_path / "few", classes=1, train=1, defective=3)
    many = made(tmp_path / "many", classes=2, train=3, good=2, defective=7)
    assert len(few) == 1 + 1 + 2 * 3
    assert few.items() <= many.items()
    assert len(set(many.values())) == len(many) == 2 * (3 + 2 + 2 * 7)
    other = made(tmp_path / "other", classes=1, train=1, defective=3, seed=2)
    assert few.keys() == other.keys()
    assert not set(few.values()) & set(other.values())


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    kept = tmp_path / "buttons" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    (tmp_path / "empty").mkdir()
    assert len(made(tmp_path / "empty", classes=1, train=1, defective=1)) == 4
    capsys.readouterr()
    for output in (kept.parent, kept, tmp_path / "empty"):
        assert make_buttons.main(["--output", str(output)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --output {str(output)!r} already holds something")
    assert [path.name for path in kept.parent.iterdir()] == ["notes.txt"]


def test_limits_are_told(tmp_path, capsys):
    for flags, sentence in (("--classes 5", "5 is not between 1 and 4"), ("--train 0", "0 is not at least 1")):
        with pytest.raises(SystemExit) as ended:
            make_buttons.main(["--output", str(tmp_path / "buttons"), *flags.split()])
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "buttons").exists()
