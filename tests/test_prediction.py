"""Judging photographs: where maps lie, which files are meant, what lands in the output folder, and what goes wrong."""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torchvision.transforms.functional import center_crop

import scripts.predict
import utils.prediction
import utils.result_files
from common.errors import NumericError, UserError
from datasets.catalog import LAYOUTS, ListingOptions
from datasets.records import ImageDataset, Record
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from tests.miniature import save, texture
from tests.test_evaluation import FirstChannel
from utils.evaluation import evaluate
from utils.pictures import heat_overlay, outline_level, sixteen_bit_map, sixteen_bit_range, with_verdict
from utils.prediction import Predictor, find_images, placed_map
from utils.protocol import EvaluationOptions

CALIBRATION = {"map_median": 0.1, "map_limit": 0.3}  # heat map: 0 at 0.1, half (and outline) at 0.4, full at 0.7
UNREADABLE = {"empty.png": b"", "text.png": b"this is no image", "cut.png": None}


def metadata(input_size: int = 64, crop_size: int = 56, **protocol) -> dict:
    return {
        "preprocessing": {
            "input_size": input_size,
            "crop_size": crop_size,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
        "protocol": {**vars(EvaluationOptions(**protocol)), "allow_missing_masks": False},
        "calibration": CALIBRATION,
        "decision": {"threshold": 0.5, "quantile": 0.99, "images": 20, "source": "quantile 0.99 of 20 scores"},
        "host": "INP-Former",
        "item": "bottle",
        "stage": 0,
        "encoder": "random_vit_tiny_14",
    }


@pytest.fixture
def predictor(tiny_detector):
    return Predictor(tiny_detector, metadata(), "cpu")


@pytest.fixture
def photos(tmp_path):
    """Four photographs of 64 x 64: a.png and c.JPG, sub/a.png and sub/b.bmp."""
    generator = np.random.default_rng(3)
    folder = tmp_path / "photos"
    for name in ("a.png", "c.JPG", "sub/a.png", "sub/b.bmp"):
        save(folder / name, texture(generator))
    return folder


@pytest.fixture
def predict(tmp_path, tiny_detector, monkeypatch):
    """Call the command in this process with a tiny model as its file; returns the exit code. Results go to tmp_path/out."""
    monkeypatch.setattr(utils.prediction, "load_packed", lambda *_: (tiny_detector, metadata()))

    def run(*flags: str | Path, output: Path = tmp_path / "out") -> int:
        return scripts.predict.main(["--model", "tiny.binaryad", "--output", str(output), *map(str, flags)])

    return run


def rows(tmp_path: Path) -> dict[str, dict[str, str]]:
    """Rows of predictions.csv by path, in its order."""
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def results(tmp_path: Path) -> set[str]:
    """Files of the output folder but the table."""
    out = tmp_path / "out"
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"predictions.csv"}


def slow_placed_map(anomaly_map: np.ndarray, size: tuple[int, int], input_size: int, crop_size: int) -> np.ndarray:
    """The affine mapping of every pixel's centre in float64: photo -> resized -> crop -> map."""
    start = int(center_crop(torch.arange(input_size).expand(1, input_size, input_size), [crop_size, crop_size])[0, 0, 0])
    positions = []
    for length in reversed(size):
        resized = (np.arange(length) + 0.5) / length * input_size
        positions.append((resized - start) / crop_size * len(anomaly_map))
    y, x = np.meshgrid(*positions, indexing="ij")
    values = ndimage.map_coordinates(anomaly_map.astype(np.float64), [y - 0.5, x - 0.5], order=1, mode="nearest")
    inside = (y >= 0) & (y < len(anomaly_map)) & (x >= 0) & (x < len(anomaly_map))
    return np.where(inside, values, np.nan)


@pytest.mark.parametrize("size", [(64, 64), (300, 171), (33, 900), (900, 7), (2, 3), (1, 1)])
@pytest.mark.parametrize(("input_size", "crop_size"), [(64, 56), (320, 280), (323, 280), (448, 391), (56, 56), (300, 100)])
def test_map_lies_where_the_model_looked(size, input_size, crop_size):
    anomaly_map = np.random.default_rng(0).random((256, 256), np.float32)
    placed = placed_map(torch.from_numpy(anomaly_map), size, input_size, crop_size)
    assert placed.dtype == np.float32
    np.testing.assert_allclose(placed, slow_placed_map(anomaly_map, size, input_size, crop_size), atol=2e-5)


@pytest.mark.parametrize("side", [16, 56, 100, 300])
@pytest.mark.parametrize(("size", "crop_size"), [((300, 171), 56), ((33, 60), 56), ((64, 64), 64)])
def test_map_of_any_size_lies_where_the_model_looked(side, size, crop_size):
    anomaly_map = np.random.default_rng(0).random((side, side), np.float32)
    placed = placed_map(torch.from_numpy(anomaly_map), size, 64, crop_size)
    np.testing.assert_allclose(placed, slow_placed_map(anomaly_map, size, 64, crop_size), atol=2e-5)


def test_a_map_at_the_photographs_size_is_placed_as_it_is():
    anomaly_map = np.random.default_rng(0).random((70, 70), np.float32)
    np.testing.assert_array_equal(placed_map(torch.from_numpy(anomaly_map), (70, 70), 70, 70), anomaly_map)


def test_a_bicubic_model_at_the_crops_size_is_called_as_it_was_measured(tmp_path):
    texture_of_20 = texture(np.random.default_rng(0))[:20, :20]
    record = Record(save(tmp_path / "a.png", texture_of_20), 0, "part")
    options = EvaluationOptions(smoothing_kernel=9, max_ratio=0.0, metric_size=0, smoothing_border="reflect")
    content = metadata(70, 70, **vars(options))
    content["preprocessing"]["interpolation"] = "bicubic"
    prediction = Predictor(FirstChannel(), content, "cpu")(record.path)
    resized = np.asarray(Image.fromarray(texture_of_20).resize((70, 70), Image.Resampling.BICUBIC))[..., 0] / 255
    normalised = ((resized - IMAGENET_MEAN[0]) / IMAGENET_STD[0]).astype(np.float32)
    expected = ndimage.gaussian_filter(normalised, 4, radius=4)
    assert prediction.score == pytest.approx(expected.max(), abs=1e-5)
    np.testing.assert_allclose(prediction.map, slow_placed_map(expected, (20, 20), 70, 70), atol=2e-5)
    evaluation = evaluate(
        FirstChannel(), ImageDataset([record], 70, 70, interpolation="bicubic"), options, 1, 0, "fp32", "part"
    )
    assert prediction.score == evaluation.scores[0]


def test_an_unknown_interpolation_is_refused(tiny_detector):
    other = metadata()
    other["preprocessing"]["interpolation"] = "lanczos"
    with pytest.raises(UserError, match="interpolation 'lanczos', this program knows bilinear and bicubic"):
        Predictor(tiny_detector, other, "cpu")


def test_map_of_a_ramp_is_the_ramp():
    """The whole way there and back: the map of a detector that returns the image must fit the image pixel by pixel."""
    ramp = np.round(np.add.outer(np.linspace(0, 100, 210), np.linspace(0, 150, 340))).astype(np.uint8)
    predictor = Predictor(FirstChannel(), metadata(288, 256, smoothing_kernel=0), "cpu")
    found = predictor(ramp).map * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    assert found.shape == (210, 340)
    rows_inside, columns_inside = slice(12, 198), slice(19, 321)  # 16 of 288 resized pixels are cut at each side
    assert np.isfinite(found[rows_inside, columns_inside]).all()
    assert np.isnan(found).sum() == 210 * 340 - (198 - 12) * (321 - 19)
    assert np.abs(found - ramp / 255)[rows_inside, columns_inside].max() < 2.5 / 255


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_and_maps_are_those_of_the_evaluation(tiny_detector, predictor, mvtec, batch_size):
    records = LAYOUTS["MVTec-AD"].test(mvtec, "bottle", ListingOptions())
    data = ImageDataset(records, 64, 56)
    evaluation = evaluate(tiny_detector, data, EvaluationOptions(), batch_size, 0, "fp32", "bottle")
    paths = [record.path for record in records]
    predictions = [
        prediction
        for start in range(0, len(paths), batch_size)
        for prediction in predictor.predict_batch(paths[start : start + batch_size])
    ]
    assert [prediction.score for prediction in predictions] == evaluation.scores.tolist()
    assert len(set(evaluation.scores)) == len(records)
    assert [prediction.path for prediction in predictions] == paths
    for prediction, smoothed in zip(predictions, evaluation.maps, strict=True):
        expected = placed_map(torch.from_numpy(smoothed), (64, 64), 64, 56)
        np.testing.assert_array_equal(prediction.map, expected)


def test_another_protocol_gives_another_score(tiny_detector):
    image = texture(np.random.default_rng(0))
    maximum = Predictor(tiny_detector, metadata(max_ratio=0.0, smoothing_kernel=0), "cpu")(image)
    assert maximum.score > Predictor(tiny_detector, metadata(), "cpu")(image).score
    assert maximum.score >= np.nanmax(maximum.map) > 0


def test_an_image_is_anomalous_above_the_threshold_only(predictor):
    image = texture(np.random.default_rng(0))
    predictor.threshold = predictor(image).score
    assert predictor(image).verdict == "OK"
    assert not predictor(image).is_anomalous
    predictor.threshold = np.nextafter(predictor.threshold, 0)
    assert predictor(image).is_anomalous
    assert predictor(image).verdict == "NG"


def test_files_arrays_and_pil_images_are_one(predictor, photos):
    path = photos / "a.png"
    image = Image.open(path)
    predictions = [predictor(source) for source in (path, str(path), image, np.asarray(image))]
    assert len({prediction.score for prediction in predictions}) == 1
    assert [prediction.path for prediction in predictions] == [path, path, None, None]
    grey = image.convert("L")
    assert predictor(np.asarray(grey)).score == predictor(grey.convert("RGB")).score != predictions[0].score
    assert predictor.predict_batch([]) == []


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_other_modes_are_judged_as_their_rgb_image(predictor, photos, tmp_path, mode):
    image = Image.open(photos / "a.png").convert(mode)
    image.save(tmp_path / "other.tif")
    expected = predictor(image.convert("RGB")).score
    assert predictor(tmp_path / "other.tif").score == predictor(image).score == expected


def test_sixteen_bit_files_are_scaled(predictor, photos, tmp_path):
    grey = np.asarray(Image.open(photos / "a.png").convert("L"))
    save(tmp_path / "deep.png", grey.astype(np.uint16) * 257)
    assert predictor(tmp_path / "deep.png").score == predictor(grey).score


def test_map_of_a_turned_photograph_fits_it_as_displayed(predictor, tmp_path):
    displayed = texture(np.random.default_rng(0), side=80)[:50]
    exif = Image.Exif()
    exif[0x0112] = 6  # display turned right by 90 degrees
    save(tmp_path / "turned.png", np.rot90(displayed).copy(), exif=exif)
    from_file, upright = predictor(tmp_path / "turned.png"), predictor(displayed)
    assert predictor(Image.open(tmp_path / "turned.png")).score == from_file.score == upright.score
    assert from_file.map.shape == (50, 80)
    np.testing.assert_array_equal(from_file.map, upright.map)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint16),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8), np.uint8),
        np.zeros(8, np.uint8),
    ],
)
def test_other_arrays_are_refused(predictor, array):
    with pytest.raises(UserError, match=r"expected uint8 of shape \(height, width, 3\)"):
        predictor(array)


def test_deep_images_in_memory_are_refused(predictor):
    with pytest.raises(UserError, match=r"'I;16'.*8 bits"):
        predictor(Image.fromarray(np.zeros((8, 8), np.uint16)))


def test_unreadable_file_is_named(predictor, tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match=r"empty\.png.*is empty.*replace or remove it"):
        predictor(tmp_path / "empty.png")


def test_map_that_is_not_finite_names_the_image(predictor, photos, monkeypatch):
    maps = torch.zeros(2, 56, 56)
    maps[1, 3, 3] = torch.inf
    monkeypatch.setattr(predictor.detector, "anomaly_map", lambda inputs: maps)
    with pytest.raises(NumericError, match=r"c\.JPG"):
        predictor.predict_batch([photos / "a.png", photos / "c.JPG"])
    with pytest.raises(NumericError, match="image 1"):
        predictor.predict_batch([np.zeros((8, 8), np.uint8)] * 2)


def test_model_with_another_normalisation_is_refused(tiny_detector):
    other = metadata()
    other["preprocessing"]["mean"] = [0.5, 0.5, 0.5]
    with pytest.raises(UserError, match=r"\[0\.5, 0\.5, 0\.5\]"):
        Predictor(tiny_detector, other, "cpu")


def test_load_opens_a_packed_file(tiny_detector, monkeypatch):
    calls = []

    def load_packed(*arguments):
        calls.append(arguments)
        return tiny_detector, metadata()

    monkeypatch.setattr(utils.prediction, "load_packed", load_packed)
    assert Predictor.load("bottle.binaryad").threshold == 0.5
    assert calls == [(Path("bottle.binaryad"), "cpu", None)]


def test_folders_are_searched_to_any_depth_for_visible_images(photos, tmp_path):
    for name in (".hidden.png", "._a.png", ".cache/x.png", "Thumbs.db", "notes.txt", "sub/readme.md"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes((photos / "a.png").read_bytes())
    assert find_images([photos], tmp_path / "out") == {
        photos / "a.png": Path("a.png"),
        photos / "c.JPG": Path("c.JPG"),
        photos / "sub" / "a.png": Path("sub/a.png"),
        photos / "sub" / "b.bmp": Path("sub/b.bmp"),
    }


def test_links_to_folders_are_named_and_not_followed(photos, tmp_path, caplog):
    elsewhere = save(tmp_path / "elsewhere" / "x.png", texture(np.random.default_rng(0))).parent
    (photos / "loop").symlink_to(photos)
    (photos / "away").symlink_to(elsewhere)
    (photos / "file.png").symlink_to(elsewhere / "x.png")
    found = find_images([photos], tmp_path / "out")
    assert set(found.values()) == {Path(name) for name in ("a.png", "c.JPG", "file.png", "sub/a.png", "sub/b.bmp")}
    assert [repr(str(photos / name)) in caplog.text for name in ("away", "loop")] == [True, True]
    assert list(find_images([photos / "away"], tmp_path / "out").values()) == [Path("x.png")]


def test_inputs_of_one_name_stay_apart_and_equal_ones_become_one(photos, tmp_path, monkeypatch):
    twin = save(tmp_path / "second" / "photos" / "a.png", texture(np.random.default_rng(0)))
    monkeypatch.chdir(tmp_path)
    found = find_images([photos / "sub", twin.parent, Path("photos/sub/a.png"), photos], tmp_path / "out")
    assert set(found.values()) == {
        Path(name) for name in ("photos/a.png", "photos/c.JPG", "photos/sub/a.png", "photos/sub/b.bmp", "second/photos/a.png")
    }
    assert len(found) == 5


def test_lists_name_images_relative_to_themselves(photos, tmp_path):
    listing = tmp_path / "lists" / "today.TXT"
    listing.parent.mkdir()
    absolute = str(photos / "c.JPG").encode()
    listing.write_bytes(b"\xef\xbb\xbf../photos/a.png\r\n\r\n" + absolute + b"\n../photos/gone.png \n../photos/\xff.png")
    found = find_images([listing], tmp_path / "out")
    assert [path.resolve() for path in found] == [photos / name for name in ("a.png", "c.JPG", "gone.png", "\udcff.png")]
    assert not any(".." in path.parts or path.is_absolute() for path in found.values())


def test_a_file_that_is_named_needs_no_image_suffix(photos, tmp_path):
    photo = (photos / "a.png").rename(photos / "camera1.dat")
    assert find_images([photo], tmp_path / "out") == {photo: Path("camera1.dat")}


@pytest.mark.parametrize(
    ("output", "folder"), [("out", "heatmaps"), ("out", "other"), (".", "heatmaps"), (".", "maps"), ("..", "maps")]
)
def test_results_are_never_read_as_input(photos, output, folder):
    expected = find_images([photos], photos / output)
    save(photos / output / folder / "sub" / "a.png.jpg", texture(np.random.default_rng(0)))
    (photos / output / "predictions.csv").touch()
    assert find_images([photos], photos / output) == expected
    assert len(expected) == 4


def test_results_of_another_output_are_no_input_either(photos, tmp_path):
    expected = find_images([photos], tmp_path / "out")
    save(photos / "earlier" / "heatmaps" / "a.png.jpg", texture(np.random.default_rng(0)))
    assert len(find_images([photos], tmp_path / "out")) == len(expected) + 1  # a user's own folder of that name
    (photos / "earlier" / "predictions.csv").touch()
    assert find_images([photos], tmp_path / "out") == expected


def test_names_that_leave_no_room_for_a_suffix_are_cut(photos, tmp_path):
    names = ["ä" * 115 + f"{number}.png" for number in range(2)]
    for name in names:
        save(photos / "long" / name, texture(np.random.default_rng(0)))
    cut = list(find_images([photos / "long"], tmp_path / "out").values())
    assert len(set(cut)) == 2
    assert all(len(os.fsencode(path.name)) < 200 for path in cut)


def test_inputs_without_images_are_named(photos, tmp_path):
    (tmp_path / "void").mkdir()
    (tmp_path / "list.txt").write_text("\n \n")
    for name, expected in (("nowhere", "neither|expected an image"), ("void", "bmp jpeg jpg"), ("list.txt", "list of paths")):
        with pytest.raises(UserError, match=expected) as caught:
            find_images([photos, tmp_path / name], tmp_path / "out")
        assert repr(str(tmp_path / name)) in str(caught.value)


def test_command_writes_table_and_heat_maps(predict, predictor, photos, tmp_path, capsys):
    scores = {path: predictor(path).score for path in find_images([photos], tmp_path)}
    threshold = np.median(list(scores.values()))
    assert predict("--input", photos, "--threshold", threshold) == 0
    assert rows(tmp_path) == {
        str(path): {
            "path": str(path),
            "score": f"{score:.6f}",
            "verdict": "NG" if score > threshold else "OK",
            "threshold": f"{threshold:.6f}",
            "error": "",
        }
        for path, score in scores.items()
    }
    assert results(tmp_path) == {f"heatmaps/{name}.jpg" for name in ("a.png", "c.JPG", "sub/a.png", "sub/b.bmp")}
    printed = capsys.readouterr().out
    assert "4 images: 2 OK, 2 NG, 0 unreadable" in printed
    assert f"threshold {threshold:.4f} (of --threshold)" in printed


def test_threshold_of_the_model_file(predict, photos, tmp_path, capsys):
    assert predict("--input", photos / "a.png", "--pictures", "none") == 0
    assert rows(tmp_path)[str(photos / "a.png")]["threshold"] == "0.500000"
    assert "threshold 0.5000 (of the model file: quantile 0.99 of 20 scores)" in capsys.readouterr().out
    assert results(tmp_path) == set()


def test_heat_map_keeps_the_photograph_s_size(predict, tmp_path):
    for name, shape in (("one.png", (1, 1)), ("tall.png", (5000, 20)), ("wide.png", (20, 5000)), ("long.png", (1, 66000))):
        save(tmp_path / "odd" / name, np.full((*shape, 3), 90, np.uint8))
    assert predict("--input", tmp_path / "odd") == 0
    sizes = {}
    for name in results(tmp_path):
        with Image.open(tmp_path / "out" / name) as picture:
            sizes[name] = picture.size
    strip = sizes["heatmaps/one.png.jpg"][1] - 1
    text = sizes["heatmaps/one.png.jpg"][0]
    assert sizes == {
        "heatmaps/one.png.jpg": (text, strip + 1),
        "heatmaps/tall.png.jpg": (text, strip + 5000),
        "heatmaps/wide.png.jpg": (5000, strip + 20),
        "heatmaps/long.png.png": (66000, strip + 1),  # too long for a JPEG
    }


def test_pictures_of_another_verdict_do_not_stay(predict, photos, tmp_path):
    assert predict("--input", photos, "--maps", "npy", "--threshold", "0") == 0
    assert len(results(tmp_path)) == 8
    assert predict("--input", photos, "--pictures", "anomalous", "--threshold", "100") == 0
    assert results(tmp_path) == set()
    assert predict("--input", photos, "--pictures", "anomalous", "--threshold", "0") == 0
    assert len(results(tmp_path)) == 4


def test_maps_as_files(predict, predictor, photos, tmp_path):
    expected = predictor(photos / "a.png").map
    assert predict("--input", photos / "a.png", "--maps", "npy", "--pictures", "none") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "maps" / "a.png.npy"), expected)
    assert predict("--input", photos / "a.png", "--maps", "png16", "--pictures", "none") == 0
    assert results(tmp_path) == {"maps/a.png.png", "maps/scale.json"}
    scale = json.loads((tmp_path / "out" / "maps" / "scale.json").read_text())
    levels = np.asarray(Image.open(tmp_path / "out" / "maps" / "a.png.png"))
    assert levels.dtype == np.uint16
    np.testing.assert_array_equal(levels == 0, np.isnan(expected))
    step = (scale["high"] - scale["low"]) / 65534
    found = np.where(levels == 0, np.nan, scale["low"] + (levels - 1.0) * step)
    np.testing.assert_allclose(found, np.clip(expected, scale["low"], scale["high"]), atol=0.51 * step)


@pytest.mark.parametrize("batch_size", ["1", "3", "10"])
def test_unreadable_images_are_recorded_and_the_rest_goes_on(predict, photos, tmp_path, capsys, batch_size):
    for name, content in UNREADABLE.items():
        (photos / name).write_bytes((photos / "a.png").read_bytes()[:500] if content is None else content)
    save(photos / "z_large.png", np.zeros((70, 70), np.uint8))
    flags = ("--input", photos, "--max_pixels", "4096", "--batch_size", batch_size, "--threshold", "100")
    assert predict(*flags) == 1
    table = rows(tmp_path)
    assert list(table) == [str(path) for path in find_images([photos], tmp_path / "out")]
    bad = {Path(path).name: row for path, row in table.items() if row["error"]}
    assert set(bad) == {*UNREADABLE, "z_large.png"}
    assert all(row["score"] == row["verdict"] == "" for row in bad.values())
    assert all(row["score"] and row["verdict"] for row in table.values() if not row["error"])
    assert "0 bytes" in bad["empty.png"]["error"]
    assert "--max_pixels" in bad["z_large.png"]["error"]
    captured = capsys.readouterr()
    assert "8 images: 4 OK, 0 NG, 4 unreadable" in captured.out
    for name, row in bad.items():
        assert captured.err.splitlines().count(row["error"]) == 1
        assert repr(str(photos / name)) in row["error"]
    assert len(results(tmp_path)) == 4


def test_nothing_but_unreadable_images(predict, tmp_path, capsys):
    (tmp_path / "empty.png").touch()
    assert predict("--input", tmp_path / "empty.png") == 1
    assert "1 images: 0 OK, 0 NG, 1 unreadable" in capsys.readouterr().out


def test_strange_names_are_harmless(predict, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    names = ["=1+1.png", "\tb.png", "line\nbreak, ' \".png", "schräg ß.png", os.fsdecode(b"\xff\xfe.png")]
    for name in names:
        Path(name).write_bytes(Path("a.png").read_bytes())
    assert predict("--input", *names) == 0
    assert list(rows(tmp_path)) == ["'=1+1.png", "'\tb.png", *names[2:]]
    assert results(tmp_path) == {f"heatmaps/{name}.jpg" for name in names}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_keep_what_is_done(predict, tiny_detector, photos, tmp_path, monkeypatch, capsys, number, code):
    original, calls = tiny_detector.anomaly_map, iter(range(100))

    def anomaly_map(inputs):
        if next(calls) == 2:
            signal.raise_signal(number)
        return original(inputs)

    monkeypatch.setattr(tiny_detector, "anomaly_map", anomaly_map)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits "ignore"
    try:
        assert predict("--input", photos) == code
    finally:
        signal.signal(signal.SIGINT, previous)
    assert list(rows(tmp_path)) == [str(photos / "a.png"), str(photos / "c.JPG")]
    assert results(tmp_path) == {"heatmaps/a.png.jpg", "heatmaps/c.JPG.jpg"}
    assert "stopped after 2 of 4 images" in capsys.readouterr().err


def test_table_is_complete_at_any_time(predict, tiny_detector, photos, tmp_path, monkeypatch):
    original, seen = tiny_detector.anomaly_map, []

    def anomaly_map(inputs):
        seen.append(len(rows(tmp_path)))
        return original(inputs)

    monkeypatch.setattr(utils.result_files, "_SECONDS_BETWEEN_TABLES", 0)
    monkeypatch.setattr(tiny_detector, "anomaly_map", anomaly_map)
    assert predict("--input", photos) == 0
    assert seen == [0, 1, 2, 3]


def test_damaged_model_ends_the_command(predict, tiny_detector, photos, tmp_path, monkeypatch, capsys):
    maps = iter([torch.zeros(1, 56, 56), torch.full((1, 56, 56), torch.nan)])
    monkeypatch.setattr(tiny_detector, "anomaly_map", lambda inputs: next(maps))
    assert predict("--input", photos) == 3
    assert repr(str(photos / "c.JPG")) in capsys.readouterr().err
    assert list(rows(tmp_path)) == [str(photos / "a.png")]


def test_output_that_cannot_be_written(predict, photos, tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    assert predict("--input", photos, output=tmp_path / "file") == 4
    assert predict("--input", photos, output=tmp_path / "file" / "below") == 4
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "heatmaps").write_text("text")
    assert predict("--input", photos) == 4
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [str(tmp_path / name) in error for name, error in zip(("file", "file", "out"), errors, strict=True)] == [True] * 3
    assert (tmp_path / "file").read_text() == (tmp_path / "out" / "heatmaps").read_text() == "text"


def test_missing_input_leaves_an_older_table_alone(predict, photos, tmp_path, capsys):
    assert predict("--input", photos, "--pictures", "none") == 0
    before = rows(tmp_path)
    assert predict("--input", photos, tmp_path / "nowhere") == 2
    assert repr(str(tmp_path / "nowhere")) in capsys.readouterr().err
    assert rows(tmp_path) == before


@pytest.mark.parametrize("flags", [("--threshold", "nan"), ("--threshold", "high"), ("--batch_size", "0"), ("--threads", "0")])
def test_wrong_flags(predict, photos, flags):
    with pytest.raises(SystemExit) as stop:
        predict("--input", photos, *flags)
    assert stop.value.code == 2


def test_threads_are_set(predict, photos, monkeypatch):
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    assert predict("--input", photos / "a.png") == 0
    assert predict("--input", photos / "a.png", "--threads", "3") == 0
    assert counts == [3]


def test_normal_parts_of_a_photograph_stay_untouched():
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    np.testing.assert_array_equal(heat_overlay(photo, np.full((40, 60), 0.1, np.float32), CALIBRATION), photo)
    np.testing.assert_array_equal(heat_overlay(photo, np.full((40, 60), -3, np.float32), CALIBRATION), photo)


def test_heat_does_not_depend_on_the_rest_of_the_image():
    photo, quiet = np.full((40, 60, 3), 90, np.uint8), np.full((40, 60), 0.1, np.float32)
    warm, hot = quiet.copy(), quiet.copy()
    warm[10, 10] = hot[10, 10] = 0.3
    hot[30, 30] = 50.0
    left, right = (heat_overlay(photo, anomaly_map, CALIBRATION) for anomaly_map in (warm, hot))
    assert (left[10, 10] != photo[10, 10]).any()
    np.testing.assert_array_equal(left[10, 10], right[10, 10])
    assert (right[30, 30] != photo[30, 30]).any()


def test_outline_and_dimming():
    photo, anomaly_map = np.full((40, 60, 3), 200, np.uint8), np.full((40, 60), 0.1, np.float32)
    anomaly_map[10:20, 10:30] = outline_level(CALIBRATION) + 0.01
    anomaly_map[:, 50:] = np.nan
    picture = heat_overlay(photo, anomaly_map, CALIBRATION)
    red = (picture == (255, 40, 40)).all(axis=2)
    frame = np.zeros((40, 60), bool)
    frame[10:20, 10:30] = True
    frame[11:19, 11:29] = False
    np.testing.assert_array_equal(red, frame)
    assert (picture[:, 50:] < 140).all()
    assert (picture[:, 50:] > 100).all()


@pytest.mark.parametrize("size", [(40, 60), (700, 900)])
def test_verdict_strip_covers_nothing(size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    good, bad = (np.asarray(with_verdict(picture, is_anomalous, "score 1")) for is_anomalous in (False, True))
    for shown in (good, bad):
        np.testing.assert_array_equal(shown[-size[0] :, : size[1]], picture)
    red, green, _ = bad[0, 0].astype(int) - good[0, 0].astype(int)
    assert red > 100
    assert green < -50
    assert (good == 255).all(axis=2)[: -size[0]].any()  # the text


def test_sixteen_bit_maps_clip_and_mark_what_was_not_seen():
    low, high = sixteen_bit_range(CALIBRATION)
    anomaly_map = np.array([[np.nan, low - 1, low], [(low + high) / 2, high, high + 1]], np.float32)
    levels = sixteen_bit_map(anomaly_map, CALIBRATION)
    assert levels.dtype == np.uint16
    assert levels.tolist() == [[0, 1, 1], [32768, 65535, 65535]]
