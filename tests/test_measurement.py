"""Measuring a category as its batches come: the numbers of all maps at once, from one process or two, or within an error."""

import logging
import pickle
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from common.errors import NumericError, UserError
from datasets.catalog import LAYOUTS, ListingOptions
from datasets.records import DefectRegion, ImageDataset, Record
from models.detector import Detector
from scripts import evaluate as evaluation_tool
from tests.commands import joint_errors
from tests.miniature import make_mvtec
from tests.miniature_layouts import make_loco
from tests.test_evaluation import FirstChannel, SmallMemory
from tests.test_pixel_scores import slow_saturated_overlap
from utils.distributed import process_group, rank
from utils.evaluation import evaluate, measure
from utils.feature_cache import FeatureDataset
from utils.measurement import Measurement
from utils.metrics import METRIC_NAMES, named
from utils.protocol import EvaluationOptions, regions_on_grid, smoothed_map

OPTIONS = EvaluationOptions()
KINDS = ("logical_anomalies", "structural_anomalies")
FOLDER = LAYOUTS["Folder"]
LITTLE = 1e-6  # GB


class Images:
    """Random images with random square defects; every second is defective, of the kinds in turn; the last has no mask."""

    input_size, crop_size, max_pixels, interpolation = 64, 56, 10**8, "bilinear"

    def __init__(self, count: int = 11, damaged: int | None = None):
        self.records = [
            Record(
                Path(f"folder/{index}.png"),
                label=index % 2,
                item="bottle",
                masks=(Path(f"masks/{index}.png"),) if index % 2 and index < count - 2 else (),
                kind=KINDS[index // 2 % 2] if index % 2 else "",
            )
            for index in range(count)
        ]
        self.damaged = damaged

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> Tensor:
        image = torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(index))
        image[0] += 0.1 * self.mask(index)[0]
        if index == self.damaged:
            image[0, 20, 30] = float("nan")
        return image

    def mask(self, index: int) -> Tensor:
        mask = torch.zeros(1, 56, 56)
        if self.records[index].masks and index != 1:  # that one's defect lies outside the crop
            row, column = torch.randint(0, 30, (2,), generator=torch.Generator().manual_seed(index)).tolist()
            mask[:, row : row + 20, column : column + 16] = 1
        return mask

    def annotations(self, index: int) -> dict:
        record = self.records[index]
        return {
            "mask": self.mask(index),
            "label": record.label,
            "path": str(record.path),
            "item": record.item,
            "has_pixel_truth": record.has_pixel_truth,
        }

    def __getitem__(self, index: int) -> dict:
        return {"image": self.image(index), **self.annotations(index)}


def regions_of(record: Record, max_pixels: int) -> list[DefectRegion]:
    """The mask as one region at twice the input's size, found as a whole from 40 % of its pixels on."""
    if not record.masks:
        return []
    mask = np.zeros((128, 128), bool)
    inside = Images().mask(int(record.path.stem))[0].numpy().astype(bool)
    mask[8:120, 8:120] = np.kron(inside, np.ones((2, 2), bool))
    return [DefectRegion(mask, 0.4 * mask.sum())]


LOCO = replace(FOLDER, split_kinds=KINDS, defect_regions=regions_of)


def run(
    data: Images | FeatureDataset,
    detector: Detector | None = None,
    options: EvaluationOptions = OPTIONS,
    layout=FOLDER,
    memory: float | None = None,
    batch_size: int = 2,
) -> Measurement | None:
    return measure(detector or FirstChannel(), data, options, batch_size, 0, "fp32", "bottle", memory, layout)


def evaluated(data: Images, options: EvaluationOptions = OPTIONS):
    return evaluate(FirstChannel(), data, options, batch_size=2, num_workers=0, precision="fp32", item="bottle")


@pytest.mark.parametrize("pro_mode", ["exact", "dinomaly"])
def test_measurement_equals_that_of_all_maps(pro_mode):
    data, options = Images(), EvaluationOptions(pro_mode=pro_mode)
    measurement, evaluation = run(data, options=options), evaluated(data, options)
    assert measurement.metrics == named(evaluation.metrics(pro_mode))
    assert None not in measurement.metrics.values()
    assert measurement.paths == evaluation.paths
    for name in ("labels", "scores"):
        np.testing.assert_array_equal(getattr(measurement, name), getattr(evaluation, name))
    assert evaluation.has_pixel_truth.tolist() == [True] * 9 + [False, True]
    assert measurement.empty_masks == 1
    assert (measurement.pixel_error, measurement.mean_gate) == (None, None)


def test_a_category_without_images_has_no_metrics():
    measurement = run(Images(0))
    assert measurement.metrics == dict.fromkeys(METRIC_NAMES)
    assert (measurement.paths, len(measurement.scores), measurement.empty_masks) == ([], 0, 0)


def test_beyond_the_memory_bound_bins_give_the_metrics_and_say_how_far_off(caplog):
    caplog.set_level(logging.WARNING)  # what --quiet shows
    data = Images()
    exact, binned = run(data), run(data, memory=LITTLE)
    assert 0 < binned.pixel_error < 1e-3
    for name in METRIC_NAMES:
        assert abs(binned.metrics[name] - exact.metrics[name]) <= binned.pixel_error
    warning, statement = [record.getMessage() for record in caplog.records]
    assert "exact pixel metrics need about 0.0052 GB, --metrics_memory allows 1e-06 GB" in warning
    assert f"1048576 bins; the exact values lie within ±{binned.pixel_error:.1e}" in statement


def test_dinomalys_aupro_does_not_fit_into_bins():
    with pytest.raises(UserError, match="--metrics_memory"):
        run(Images(), options=EvaluationOptions(pro_mode="dinomaly"), memory=LITTLE)


def test_kinds_and_saturating_regions_add_their_columns():
    data = Images()
    measurement = run(data, layout=LOCO)
    names = ["I-AUROC-logical", "I-AUROC-structural", "I-AUROC-mean", "AU-sPRO"]
    assert list(measurement.metrics) == [*METRIC_NAMES, *names]
    assert {name: measurement.metrics[name] for name in METRIC_NAMES} == run(data).metrics
    maps, regions = [], []
    for index in range(len(data)):
        if data.records[index].has_pixel_truth:
            maps.append(Steps().anomaly_map(data[index]["image"][None])[0].numpy())
            mask = data[index]["mask"]
            nearest = F.interpolate(mask[None], (256, 256))[0, 0].numpy() > 0.5
            regions.append([DefectRegion(nearest, 0.4 * float(mask.sum()) * (256 / 56) ** 2)] if nearest.any() else [])
    expected = slow_saturated_overlap(np.stack(maps), regions)
    assert 0.1 < expected < 0.9
    plain = EvaluationOptions(smoothing_kernel=0)
    assert run(data, Steps(), plain, LOCO).metrics["AU-sPRO"] == pytest.approx(expected, abs=1e-12)


def test_cached_features_are_measured_like_their_images():
    images = Images()
    cached = FeatureDataset(images, np.stack([images.image(index).numpy() for index in range(len(images))]))
    assert run(cached, layout=LOCO).metrics == run(images, layout=LOCO).metrics


class Steps(FirstChannel):
    """Few distinct scores at the size of the metrics, for a sweep over all of them."""

    def anomaly_map(self, inputs: Tensor) -> Tensor:
        return F.interpolate((inputs[:, :1] * 20).round() / 20, (256, 256))[:, 0]


class CropSteps(FirstChannel):
    """Few distinct scores at the crop's size."""

    def anomaly_map(self, inputs: Tensor) -> Tensor:
        return (inputs[:, 0] * 20).round() / 20


def test_maps_are_measured_at_the_crops_size():
    options, data = EvaluationOptions(smoothing_kernel=9, metric_size=0, smoothing_border="reflect"), Images()
    measurement, evaluation = run(data, options=options), evaluated(data, options)
    known = evaluation.has_pixel_truth
    masks = np.stack([data.mask(index)[0].numpy() > 0.5 for index in range(len(data))])
    smoothed = np.stack([gaussian_filter(data.image(index)[0].numpy(), 4, radius=4) for index in range(len(data))])
    truth, pixels = masks[known].ravel(), smoothed[known].ravel()
    assert measurement.metrics["P-AUROC"] == pytest.approx(roc_auc_score(truth, pixels), abs=1e-12)
    assert measurement.metrics["P-AP"] == pytest.approx(average_precision_score(truth, pixels), abs=1e-12)
    assert measurement.metrics == named(evaluation.metrics("exact"))


def test_saturating_regions_are_measured_at_the_crops_size():
    data, options = Images(), EvaluationOptions(smoothing_kernel=0, metric_size=0)
    maps, regions = [], []
    for index in range(len(data)):
        if data.records[index].has_pixel_truth:
            maps.append((data.image(index)[0].numpy() * 20).round() / 20)
            mask = data.mask(index)[0].numpy() > 0.5
            regions.append([DefectRegion(mask, 0.4 * mask.sum())] if mask.any() else [])
    expected = slow_saturated_overlap(np.stack(maps), regions)
    assert 0.1 < expected < 0.9
    assert run(data, CropSteps(), options, LOCO).metrics["AU-sPRO"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("size", "memory"), [(0, "0.00025"), (112, "0.001"), (256, "0.0052")])
def test_memory_of_exact_metrics_follows_from_the_maps_size(size, memory, caplog):
    """10 images of known truth, 4 bytes a pixel, and 100 bytes for a tenth of the pixels of the 4 defective ones."""
    options, data = EvaluationOptions(metric_size=size), Images()
    binned = run(data, options=options, memory=LITTLE)
    assert f"exact pixel metrics need about {memory} GB" in caplog.records[0].getMessage()
    exact = run(data, options=options).metrics
    for name in METRIC_NAMES:
        assert abs(binned.metrics[name] - exact[name]) <= binned.pixel_error


def test_a_region_keeps_its_share_on_the_grid():
    """Image 100 x 200, resized to 64 x 64, cropped to 56 x 56, seen at 256 x 256: 1 pixel becomes 1 / 0.2048 x (256 / 56)^2."""
    mask = np.zeros((100, 200), bool)
    mask[25:75, 50:150] = True
    whole, small = regions_on_grid([DefectRegion(mask, 5000.0), DefectRegion(mask, 10.0)], 64, 56, OPTIONS)
    density = 64 * 64 / (100 * 200) * (256 / 56) ** 2
    assert whole.mask.sum() == pytest.approx(5000 * density, rel=0.03)
    assert whole.saturation == pytest.approx(min(5000 * density, whole.mask.sum()), abs=1e-9)
    assert small.saturation == pytest.approx(10 * density, abs=1e-9)
    rows, columns = whole.mask.any(axis=1).nonzero()[0], whole.mask.any(axis=0).nonzero()[0]
    first, last = (256 / 56 * (corner * 0.64 - 4) for corner in (25, 75))
    assert (rows[0], rows[-1] + 1) == pytest.approx((first, last), abs=3)
    assert (columns[0], columns[-1] + 1) == pytest.approx((first, last), abs=3)


def test_the_crop_takes_regions_away_or_a_part_of_them():
    outside, partial = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    outside[:4] = True
    partial[0:8, 4:60] = True
    (kept,) = regions_on_grid([DefectRegion(outside, 9.0), DefectRegion(partial, 448.0)], 64, 56, OPTIONS)
    assert kept.saturation == kept.mask.sum() == pytest.approx(224 * (256 / 56) ** 2, rel=0.05)


def test_regions_on_the_crops_own_pixels():
    mask = np.zeros((64, 64), bool)
    mask[10:20, 10:20] = True
    (region,) = regions_on_grid([DefectRegion(mask, 30.0)], 64, 56, EvaluationOptions(metric_size=0))
    np.testing.assert_array_equal(region.mask, mask[4:-4, 4:-4])
    assert region.saturation == pytest.approx(30.0)


def test_regions_beside_bicubic_images_take_the_nearest_pixel():
    mask = np.zeros((100, 100), bool)
    mask[31:58, 40:43] = True
    centres = ((np.arange(64) + 0.5) * 100 / 64).astype(int)[4:-4]
    options = EvaluationOptions(mask_threshold=0.7, metric_size=0)
    (region,) = regions_on_grid([DefectRegion(mask, 9.0)], 64, 56, options, "bicubic")
    np.testing.assert_array_equal(region.mask, mask[np.ix_(centres, centres)])


class Prototypes(SmallMemory):
    def prototype_map(self, inputs: Tensor) -> Tensor:
        if len(inputs) > self.limit:
            raise torch.OutOfMemoryError("no memory")
        return inputs[:, 1]


def test_prototype_scoring_takes_the_other_map_and_halves_its_batches():
    options = EvaluationOptions(scoring="prototype")
    data = Images(4)
    measurement = run(data, Prototypes(limit=1), options, batch_size=4)
    images = torch.stack([data[index]["image"][1] for index in range(4)])
    expected = np.sort(smoothed_map(images, OPTIONS).numpy().reshape(4, -1), axis=1)[:, -655:].mean(axis=1)
    np.testing.assert_allclose(measurement.scores, expected, rtol=1e-5)


def test_a_detector_without_prototypes_cannot_score_by_them():
    with pytest.raises(UserError, match="FirstChannel has no prototypes"):
        run(Images(), options=EvaluationOptions(scoring="prototype"))


def test_a_stored_protocol_without_scoring_is_of_reconstruction():
    config = {
        "mask_threshold": 0.5,
        "smoothing_kernel": 5,
        "smoothing_sigma": 4.0,
        "max_ratio": 0.01,
        "pro_mode": "exact",
        "seed": 1,
    }
    assert EvaluationOptions.from_config(config) == EvaluationOptions()
    prototype = EvaluationOptions.from_config({**config, "scoring": "prototype"})
    assert prototype.describe() == f"distance to the nearest prototype, {EvaluationOptions().describe()}"
    del config["max_ratio"]
    with pytest.raises(KeyError):
        EvaluationOptions.from_config(config)


def test_a_damaged_map_names_its_image():
    with pytest.raises(NumericError, match=r"folder/7\.png"):
        run(Images(damaged=7))


SCENES = {
    "exact": {"layout": LOCO},
    "bins": {"layout": LOCO, "memory": LITTLE},
    "uneven batches": {"batch_size": 4},
    "one batch for two": {"batch_size": 11},
    "no image": {"data": Images(0)},
}


def measured(scene: str) -> Measurement | None:
    return run(**{"data": Images(), **SCENES[scene]})


def measure_together(folder: Path) -> None:
    """What each of two processes does: measure every scene, then one whose damaged image only the second process sees."""
    with process_group():
        results = {scene: measured(scene) for scene in SCENES}
        try:
            run(Images(damaged=9))
        except NumericError as error:
            results["error"] = str(error)
    (folder / f"{rank()}.pickle").write_bytes(pickle.dumps(results))


def test_two_processes_measure_what_one_does(commands, tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(f"""import pathlib
from tests.test_measurement import measure_together
measure_together(pathlib.Path({str(tmp_path)!r}))
""")
    joint_errors(commands.start_two(str(script)))
    main, other = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2))
    assert "folder/9.png" in main["error"]
    assert other == {**dict.fromkeys(SCENES), "error": main["error"]}
    for scene in SCENES:
        expected, found = measured(scene), main[scene]
        for name, value in vars(replace(expected, seconds=found.seconds)).items():
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=f"{scene}: {name}", strict=True)


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """Call the evaluation tool with a packed model's stand-in on a miniature MVTec-LOCO and Folder; returns its outputs."""
    description = {
        "preprocessing": {"input_size": 64, "crop_size": 56},
        "protocol": {**asdict(OPTIONS), "seed": 1},
        "decision": {"threshold": 2.0},
    }
    (tmp_path / "model.binaryad").write_bytes(bytes(30_000))
    monkeypatch.setattr(evaluation_tool, "load_packed", lambda path, device, weights: (FirstChannel(), description))
    roots = {"MVTec-LOCO": make_loco(tmp_path / "loco"), "Folder": make_mvtec(tmp_path / "folder")}

    def call(*names: str, flags: tuple[str, ...] = (), item: tuple[str, ...] = ("breakfast_box",)) -> tuple[str, str]:
        paths = [str(roots[name]) for name in names]
        words = ["--model", str(tmp_path / "model.binaryad"), "--dataset", "+".join(names), "--data_path", *paths, "--quiet"]
        assert evaluation_tool.main([*words, "--item", *item, *flags]) == 0
        return tuple(capsys.readouterr())

    call.roots = roots
    return call


def cells_of(printed: str) -> list[list[str]]:
    return [re.split(" {2,}", line.strip()) for line in printed.splitlines()]


def test_tool_shows_the_columns_that_a_data_set_has_beyond_the_seven(tool):
    header, logical, plain = cells_of(tool("MVTec-LOCO", "Folder", item=("breakfast_box", "bottle"))[0])
    extra = ["I-AUROC-logical", "I-AUROC-structural", "I-AUROC-mean", "AU-sPRO"]
    assert header == ["model", "item", *METRIC_NAMES, *extra, "OK right", "NG right", "MB", "ms per image"]
    layout = LAYOUTS["MVTec-LOCO"]
    images = ImageDataset(layout.test(tool.roots["MVTec-LOCO"], "breakfast_box", ListingOptions()), 64, 56)
    expected = run(images, layout=layout)
    assert logical[:2] == ["model.binaryad", "MVTec-LOCO/breakfast_box"]
    assert logical[2:13] == [f"{100 * expected.metrics[name]:.2f}" for name in header[2:13]]
    judged = [(label, score > 2.0) for label, score in zip(expected.labels, expected.scores, strict=True)]
    assert logical[13:16] == [f"{judged.count((0, False))}/3", f"{judged.count((1, True))}/4", "0.03"]
    assert plain[9:13] == ["n/a"] * 4
    assert cells_of(tool("Folder", item=("bottle",))[0])[0] == [*header[:9], *header[13:]]


def test_tool_keeps_to_the_memory_it_is_given(tool):
    exact, nothing = tool("MVTec-LOCO")
    binned, errors = tool("MVTec-LOCO", flags=("--metrics_memory", "0.001"))
    assert "bins" not in nothing
    assert "--metrics_memory allows 0.001 GB" in errors
    assert "the exact values lie within" in errors
    for first, second in zip(cells_of(exact)[1][2:13], cells_of(binned)[1][2:13], strict=True):
        assert float(second) == pytest.approx(float(first), abs=0.1)


def test_tool_under_torchrun_prints_one_table(tool, monkeypatch):
    monkeypatch.setattr(evaluation_tool, "measure", lambda *arguments: None)
    monkeypatch.setattr(evaluation_tool, "is_main", lambda: False)
    assert tool("Folder", item=("bottle",))[0] == ""
