"""Readers of run folders, settings, lists, indices of data sets and images, for the fuzzer."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import numpy as np
import yaml
from PIL import ExifTags, Image

from common.errors import ResourceError, UserError
from datasets import elpv, mvtec_loco, realiad, visa
from datasets.catalog import LAYOUTS
from datasets.images import image_size, load_image, load_mask
from datasets.records import Record
from tests.fuzz_engine import Reader
from tests.miniature import make_elpv, save, texture, with_defect
from tests.miniature_layouts import make_loco, make_realiad, make_visa_downloaded
from tests.run_folders import make_run, row
from utils.arguments import base_parser, parse
from utils.comparison import compare_runs
from utils.comparison_csv import write_csv
from utils.comparison_page import write_markdown, write_page
from utils.comparison_tables import cost_table, overview
from utils.hosts import INP_FORMER, RAAD
from utils.prediction import find_images
from utils.published import PUBLISHED_FILE, Published, read_published
from utils.report import write_run_report
from utils.result_files import MetricsLog, write_failures, write_pixel_errors, write_scores
from utils.run_folder import RunFolder
from utils.run_lock import run_lock
from utils.settings import IDENTITY_KEYS, Settings, settings_of

LARGEST = 1_000_000  # pixels
ITEMS = ["bottle", "cable"]
PUBLISHED = cache(read_published)  # the real file


# ---- run folders


def make_run_folder(name: str, folder: Path, variant: int) -> Path:
    """A run with everything that a training can leave beside its models; returns one of its files."""
    rows = {"bottle": row(0.5 + variant / 8, AUPRO=0.75), "cable": row(None)}
    host = RAAD if name == "quantization.json" else INP_FORMER
    path = make_run(folder, rows, host=host, items=[*ITEMS, "capsule"], seed=variant, platform="Linux")
    if name == "results.csv":  # so that the report has something to show
        make_run(folder / "sound", rows, "--save_name", "Sound", items=ITEMS)
    write_failures(path / "failures.csv", {"capsule": "an image is damaged", "=sum": "so it is"})
    write_pixel_errors(path / "pixel_errors.csv", {"bottle": 0.0005 + variant / 1000})
    write_scores(path / "bottle" / "scores.csv", [(f"{number}.png", "bottle", number % 2, number / 7) for number in range(6)])
    log = MetricsLog(path / "metrics.jsonl", "bottle")
    for iteration in (10, 20, 30):
        log.training(iteration, 1 / iteration + variant, 1e-3, 0.25, {"reconstruction": 0.5})
    log.append("evaluation", mean_gate=0.5, pixel_error=None, AUPRO=0.75)
    timing = {
        "milliseconds": 12.5 + variant,
        "engine": "torch float32",
        "model": "model.pth",
        "machine": ["a CPU"],
        "date": "2026-01-02",
    }
    (path / "timing.json").write_text(json.dumps(timing))
    size = {"effective_teacher_student": 1e6 + variant, "effective_all": 2e6}
    (path / "bottle" / "quantization.json").write_text(json.dumps({"size": size, "layers": []}))
    return next(path.rglob(name))


def run_of(path: Path) -> Path:
    """The run folder of one of its files."""
    return path.parent if path.parent.name not in ITEMS else path.parents[1]


def text_of(path: Path) -> str:
    """A text that may hold names of files, which may be any bytes."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def reported(path: Path) -> dict[str, str]:
    """As scripts.report does."""
    folder, published = run_of(path), PUBLISHED()
    output = folder.parent / "report"
    sound = folder.parent / "sound"
    comparison = compare_runs([folder, *sound.glob("*")])
    texts = {"tables": "".join(overview(part).text() + cost_table(part).text() for part in comparison.sections)}
    texts["notes"] = "\n".join([*comparison.warnings, *comparison.missing])
    for name, write in (("md", write_markdown), ("csv", write_csv), ("html", write_page)):
        write(output.with_suffix(f".{name}"), comparison, published)
        texts[name] = text_of(output.with_suffix(f".{name}"))
    return texts


def described(path: Path) -> dict[str, str]:
    """As the end of every training does."""
    folder = run_of(path)
    write_run_report(folder)
    return {"page": text_of(folder / "report.html")}


def resumed(path: Path) -> dict[str, object]:
    """As a training in a folder that it has begun before does; in a copy, for it goes on with all files."""
    copied = run_of(path).parent / "copy"
    shutil.rmtree(copied, ignore_errors=True)
    folder = RunFolder(Path(shutil.copytree(run_of(path), copied)))
    folder.claim(settings_of_run().config, IDENTITY_KEYS, {"encoder_sha256": "e"}, overwrite=False)
    known = {"rows": folder.rows(), "errors": folder.pixel_errors(), "failures": folder.failures()}
    MetricsLog(copied / "metrics.jsonl", "bottle").truncate(20)
    folder.add_row("capsule", row(0.25), ITEMS, 0.001)
    written = {name: text_of(copied / name) for name in ("metrics.jsonl", "results.csv", "pixel_errors.csv")}
    return {**known, **written, "items": folder.environment().get("items", [])}


@cache
def settings_of_run() -> Settings:
    """The command that made the run."""
    flags = ["--dataset", "MVTec-AD", "--data_path", "data", "--clb_stage", "0", "--total_iters", "100"]
    return settings_of(parse(base_parser("", INP_FORMER, ["single"]), flags))


def has_no_garbage(value: dict[str, str], original: dict[str, str]) -> None:
    """No table may hold what is no number."""
    for text in value.values():
        assert "nan" not in re.findall(r"\w+", text), "a table with nan"
        assert "inf" not in re.findall(r"\w+", text), "a table with inf"


def has_fractions(value: dict[str, object], original: dict[str, object]) -> None:
    """Metrics and errors are fractions, names are text."""
    numbers = [number for row in value["rows"].values() for number in row.values() if number is not None]
    for number in [*numbers, *value["errors"].values()]:
        assert 0 <= number <= 1, number
    for name in [*value["rows"], *value["errors"], *value["failures"], *value["items"]]:
        assert isinstance(name, str), name
    assert all(isinstance(reason, str) for reason in value["failures"].values())


# ---- settings and lists of the user


def as_argparse(call: Callable[[], object]) -> object:
    """What argparse tells the user as the UserError that other parts of the program raise."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return call()
    except SystemExit as end:
        raise UserError(printed.getvalue().removesuffix("\n")) from end


def make_config(folder: Path, variant: int) -> Path:
    content = {
        "dataset": "MVTec-AD", "data_path": ["data"], "item": ITEMS, "encoder": "random_vit_tiny_14", "input_size": 64,
        "crop_size": 56, "clb_stage": 0, "total_epochs": 10 + variant, "learning_rate": 0.001, "skip_bad_images": True,
        "sab": "off", "save_dir": "runs", "seed": variant, "gradient_clip": 0.1, "true_false": "f1max",
    }  # fmt: skip
    (folder / "settings.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "settings.yaml"


def configured(path: Path) -> dict:
    """As every training script does with --config."""
    arguments = as_argparse(lambda: parse(base_parser("", INP_FORMER, ["single"]), ["--config", str(path)]))
    settings = settings_of(arguments)
    return {"config": settings.config, "folder": str(settings.run_path)}


def is_a_command(value: dict, original: dict) -> None:
    """All values have the types that flags have, and the run lies below --save_dir."""
    for key, other in original["config"].items():
        found = value["config"][key]
        assert other is None or found is None or type(found) is type(other), (key, found)
    for number in ("learning_rate", "gradient_clip", "weight_decay"):
        assert math.isfinite(value["config"][number]), number
    save_dir, folder = (Path(os.path.normpath(path)) for path in (value["config"]["save_dir"], value["folder"]))
    assert folder.is_relative_to(save_dir), folder


def make_published(folder: Path, variant: int) -> Path:
    """The first rows of the real file, or the last ones."""
    head, *lines = PUBLISHED_FILE.read_text(encoding="utf-8").splitlines()
    (folder / "published.csv").write_text("\n".join([head, *(lines[:12] if variant == 0 else lines[-12:])]) + "\n")
    return folder / "published.csv"


def has_percents(value: Published, original: Published) -> None:
    for published in value.rows:
        assert all(not cell or 1 < float(cell) <= 100 for cell in published.metrics.values())
        assert published.metric_size >= 0
    for claim in value.claims:
        assert all(math.isfinite(number) for number in (claim.size_ratio, claim.flops_ratio, claim.auroc_loss)), claim


def make_list(folder: Path, variant: int) -> Path:
    for number in range(4):
        save(folder / "photos" / f"{number}.png", texture(np.random.default_rng(number)))
    (folder / "list.txt").write_text("".join(f"photos/{number + variant}.png\n" for number in range(3)))
    return folder / "list.txt"


def listed(path: Path) -> dict[str, str]:
    """As scripts.predict does with a list: every image with the place of its results below the output folder."""
    images = find_images([path], path.with_name("output"))
    for image in images:
        with contextlib.suppress(UserError):
            load_image(image, LARGEST)
    return {os.path.relpath(image, path.parent): str(name) for image, name in images.items()}


def stay_below_the_output(value: dict[str, str], original: dict[str, str]) -> None:
    for name in value.values():
        assert not os.path.isabs(name), name
        assert ".." not in Path(name).parts, name


def make_lock(folder: Path, variant: int) -> Path:
    """The lock of a process that is gone: its number is beyond those that Linux gives."""
    (folder / "run.lock").write_text(f"process {2**22 + 1 + variant} on {socket.gethostname()}\n")
    return folder / "run.lock"


def locked(path: Path) -> str:
    """As every training does."""
    with run_lock(path.parent):
        return path.read_text().split(" on ")[1]


# ---- data sets


def in_data_set(layout: ModuleType, item: str, index: str, path: Path) -> list:
    """As every training does: records of training and test, and the pixels of their files."""
    root = path.parents[index.count("/")]
    records = [*layout.train_records(root, item), *layout.test_records(root, item)]
    for record in records:
        for file in (record.path, *record.masks):
            load_image(file, LARGEST)
    return [tuple_of(record, root) for record in records]


def tuple_of(record: Record, root: Path) -> tuple:
    masks = tuple(os.path.relpath(mask, root) for mask in record.masks)
    return os.path.relpath(record.path, root), record.label, record.item, masks, record.kind


def are_records(value: list, original: list) -> None:
    """Files of the data set, good ones without masks."""
    assert value
    for path, label, item, masks, kind in value:
        assert all(".." not in Path(name).parts for name in (path, *masks)), (path, masks)
        assert label in (0, 1)
        assert item == original[0][2]
        assert label == 1 or not masks
        assert isinstance(kind, str)


def make_index(make: Callable[..., Path], index: str, folder: Path, variant: int) -> Path:
    """A miniature data set; in the second variant its index names less, or other thresholds."""
    make(folder, **({"count": 12} if make is make_elpv else {}))
    path = folder / index
    if variant and path.suffix == ".json":
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            content["test"] = content["test"][1:]
        else:
            content[0]["saturation_threshold"] = 30
        path.write_text(json.dumps(content))
    elif variant:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    return path


def loco_regions(path: Path) -> list:
    """As the evaluation of MVTec-LOCO does."""
    root = path.parents[1]
    records = [record for record in LAYOUTS["MVTec-LOCO"].test(root, path.parent.name) if record.label]
    regions = [region for record in records for region in mvtec_loco.defect_regions(record, LARGEST)]
    return [(int(region.mask.sum()), region.saturation) for region in regions]


def saturate(value: list, original: list) -> None:
    assert [area for area, _ in value] == [area for area, _ in original]
    for area, saturation in value:
        assert 0 < saturation <= area, (area, saturation)


# ---- images


def make_image(suffix: str, mode: str, folder: Path, variant: int) -> Path:
    generator = np.random.default_rng(variant)
    pixels = texture(generator, 40)[:30]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "a camera"
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    options = {"compression": "tiff_lzw"} if suffix == ".tif" and mode == "L" else {}
    image.save(folder / f"image{suffix}", exif=exif, **options) if suffix != ".bmp" else image.save(folder / f"image{suffix}")
    return folder / f"image{suffix}"


def decoded(path: Path) -> dict:
    """As every command does with an image, and as the check of sizes does before."""
    image = load_image(path, LARGEST)
    return {"pixels": np.asarray(image), "mode": image.mode, "size": image.size, "size before": image_size(path, LARGEST)}


def is_an_image(value: dict, original: dict) -> None:
    width, height = value["size"]
    assert value["mode"] == "RGB"
    assert value["pixels"].shape == (height, width, 3)
    assert value["pixels"].dtype == np.uint8
    assert 0 < width * height <= LARGEST
    assert value["size before"] == value["size"], value["size before"]


def make_mask(suffix: str, folder: Path, variant: int) -> Path:
    return save(folder / f"mask{suffix}", with_defect(np.random.default_rng(variant), 40)[1])


def masked(path: Path) -> np.ndarray:
    """As an evaluation does."""
    return np.asarray(load_mask(path, LARGEST))


def is_a_mask(value: np.ndarray, original: np.ndarray) -> None:
    assert value.dtype == np.uint8
    assert 0 < value.size <= LARGEST
    assert set(np.unique(value)) <= {0, 255}


def _images(suffix: str) -> dict[str, object]:
    """Form of mutations of an image file; the library that decodes compressed TIFF complains itself."""
    return {"form": "png" if suffix == ".png" else "bytes", "chatty": suffix == ".tif"}


IMAGES = [
    (".png", "RGB"), (".png", "I;16"), (".png", "P"), (".jpg", "RGB"), (".jpg", "CMYK"), (".bmp", "RGB"), (".tif", "RGB"),
    (".tif", "L"), (".webp", "RGB"),
]  # fmt: skip
INDICES = [
    ("Real-IAD index", realiad, make_realiad, "audiojack", "realiad_jsons/realiad_jsons/audiojack.json", "json"),
    ("VisA split", visa, make_visa_downloaded, "pcb1", "split_csv/1cls.csv", "csv"),
    ("ELPV labels", elpv, make_elpv, "mono", "labels.csv", "lines"),
]
SATURATIONS = partial(make_index, make_loco, "breakfast_box/defects_config.json")
FORMS = {
    "config.yaml": "yaml", "env.json": "json", "cost.json": "json", "timing.json": "json", "quantization.json": "json",
    "results.csv": "csv", "failures.csv": "csv", "pixel_errors.csv": "csv", "metrics.jsonl": "json lines", "scores.csv": "csv",
}  # fmt: skip
REPORTED = [name for name in FORMS if name not in ("metrics.jsonl", "scores.csv")]
DESCRIBED = ["config.yaml", "metrics.jsonl", "scores.csv"]
RESUMED = ["config.yaml", "env.json", "metrics.jsonl", "results.csv", "failures.csv", "pixel_errors.csv"]


def _of_run(name: str, purpose: str, read: Callable[[Path], object], **others) -> Reader:
    """A reader of a file of a run folder."""
    return Reader(f"{name} {purpose}", partial(make_run_folder, name), read, FORMS[name], **others)


READERS = [
    *(_of_run(name, "reported", reported, check=has_no_garbage) for name in REPORTED),
    *(_of_run(name, "described", described, check=has_no_garbage) for name in DESCRIBED),
    *(_of_run(name, "resumed", resumed, check=has_fractions, names=("/copy'",)) for name in RESUMED),
    Reader("settings of --config", make_config, configured, "yaml", check=is_a_command, names=("--",)),
    Reader("published results", make_published, read_published, "csv", check=has_percents),
    Reader("list of images", make_list, listed, "lines", check=stay_below_the_output, may_leave=True),
    Reader("run.lock", make_lock, locked, "lines", refusals=(UserError, ResourceError)),
    *(
        Reader(
            name,
            partial(make_index, make, index),
            partial(in_data_set, layout, item, index),
            form,
            check=are_records,
            names=("/inside/",),
        )
        for name, layout, make, item, index, form in INDICES
    ),
    Reader("MVTec-LOCO saturations", SATURATIONS, loco_regions, "json", check=saturate),
    *(
        Reader(f"image {suffix} {mode}", partial(make_image, suffix, mode), decoded, check=is_an_image, **_images(suffix))
        for suffix, mode in IMAGES
    ),
    *(
        Reader(f"mask {suffix}", partial(make_mask, suffix), masked, check=is_a_mask, **_images(suffix))
        for suffix in (".png", ".bmp")
    ),
]
