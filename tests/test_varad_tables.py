"""VarAD's tables: the published figures, which runs they stand beside, and the commands that train for them."""

import csv
import sys

import pytest
import yaml

from scripts import report
from tests.conftest import REPOSITORY
from tests.miniature import make_mvtec
from tests.run_folders import make_run, row
from tests.table_scripts import table_runner
from utils.arguments import base_parser, parse
from utils.comparison import compare_runs
from utils.comparison_tables import result_table
from utils.hosts import VARAD
from utils.published import read_published
from utils.settings import settings_of

PIXEL_COLUMNS, IMAGE_COLUMNS = ("P-AUROC", "P-F1", "P-AP"), ("I-AUROC", "I-F1", "I-AP")
DATASETS = ("MVTec-AD", "VisA", "BTAD", "DTD-Synthetic")
# AUROC/max-F1/AP as the paper prints them, on the data sets above: pixels in tables II and IV, images in table III
PIXELS = {
    "VarAD": "97.7/63.8/63.0 98.5/47.5/40.7 97.8/63.6/64.5 98.8/77.3/80.9",
    "CDO": "96.4/62.8/62.9 97.6/46.5/37.7 97.7/57.1/56.5 97.4/72.3/75.5",
    "MSFlow": "97.2/62.4/62.7 96.9/43.9/37.4 97.5/48.1/46.4 98.1/71.0/76.8",
    "PatchCore": "95.8/60.1/60.5 95.1/46.6/38.9 97.0/50.1/47.5 96.0/70.6/70.8",
    "VarAD, ViT-B/16": "93.6/51.8/48.9 90.9/30.6/24.5 91.3/32.4/29.3 88.4/60.2/58.1",
    "VarAD, MAE ViT-B/16": "61.5/12.5/7.7 59.2/3.5/1.4 72.6/14.3/8.2 53.5/2.7/1.3",
    "VarAD, CLIP ViT-B/16": "95.5/53.5/51.6 95.5/35.5/27.6 96.0/49.8/49.3 90.8/61.7/60.8",
    "VarAD, DINOv2 ViT-B/14": "97.9/65.1/64.6 98.9/52.9/48.7 98.1/66.2/68.3 99.1/78.5/82.7",
    "VarAD, DINOv2 ViT-L/14": "95.6/55.2/52.5 96.7/38.4/32.4 95.0/39.6/36.1 95.3/71.7/72.5",
}
IMAGES = {"VarAD": "91.3/92.6/95.8 90.3/86.1/91.0 95.1/92.0/95.7 96.3/96.3/98.5"}
ROWS = {"bottle": row(0.9, P_AUROC=0.97, P_AP=0.6, P_F1=0.61)}


def varad(root, *flags, rows=ROWS, image_size="1024", **further):
    return make_run(root, rows, "--image_size", image_size, *flags, host=VARAD, **further)


def table_of(*folders):
    (section,) = compare_runs(folders).sections
    table = result_table(section, read_published())
    return [dict(zip(table.rows[0], cells, strict=True)) for cells in table.rows[1:]], table.notes


def methods_of(*folders):
    return [line["method or run"] for line in table_of(*folders)[0] if line["kind"] != "ours"]


def test_the_published_figures_stand_in_the_columns_that_the_paper_means():
    rows = [row for row in read_published().rows if "VarAD paper" in row.source]
    found = {(row.method, row.dataset): row for row in rows}
    assert len(found) == len(rows) == len(PIXELS) * len(DATASETS)
    for method, line in PIXELS.items():
        images = IMAGES.get(method, "// // // //").split()
        for dataset, pixel, image in zip(DATASETS, line.split(), images, strict=True):
            published = found[method, dataset]
            expected = dict(
                zip(("P-AUROC", "P-F1", "P-AP", "I-AUROC", "I-F1", "I-AP"), f"{pixel}/{image}".split("/"), strict=True)
            )
            assert published.metrics == {**expected, "AUPRO": ""}
            assert (published.kind, published.setting, published.item) == ("published", "single-class", "Mean")
            assert (published.input_size, published.metric_size) == ("1024", 0)
            table = "table IV" if "ViT" in method else "table II"
            where = "tables II (pixels) and III (images)" if method == "VarAD" else table
            assert published.source == f"VarAD paper, {where}, at 1024 px"


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_report_shows_the_papers_figures_beside_the_measured_ones(tmp_path, dataset):
    item = {"MVTec-AD": "bottle", "VisA": "candle", "BTAD": "01", "DTD-Synthetic": "Woven_001"}[dataset]
    run = varad(tmp_path, "--dataset", dataset, rows={item: row(0.9, P_AUROC=0.97, P_AP=0.6, P_F1=0.61)})
    lines, notes = table_of(run)
    assert [line["method or run"] for line in lines] == [*PIXELS, "VarAD-Single-Class"]
    pixel, image = (table["VarAD"].split()[DATASETS.index(dataset)] for table in (PIXELS, IMAGES))
    assert [lines[0][name] for name in ("P-AUROC", "P-F1", "P-AP")] == pixel.split("/")
    assert [lines[0][name] for name in ("I-AUROC", "I-F1", "I-AP")] == image.split("/")
    assert [lines[-1][name] for name in ("P-AUROC", "P-F1", "P-AP")] == ["97.00", "61.00", "60.00"]
    assert "Published: dinov2_vit_small_14 at 1024 px unless the name says otherwise; VarAD: maps at the images' size" in str(
        notes
    )
    assert "differs" not in str(notes)
    output = tmp_path / "table.md"
    assert report.main([str(run), "--output", str(output)]) == 0
    written = list(csv.DictReader(output.with_suffix(".csv").open()))
    assert {line["name"]: line["metric_size"] for line in written if line["item"] == "Mean"} == dict.fromkeys(
        [*PIXELS, "VarAD-Single-Class"], "0"
    )


@pytest.mark.parametrize(
    ("flags", "differs"),
    [
        ({"image_size": "512"}, "dinov2_vit_small_14 at 504/504 px"),
        ({"model": "dinov2_vitb14"}, None),  # a row of its own in table IV
        ({"model": "dinov2_vits14_reg"}, "dinov2reg_vit_small_14 at 1022/1022 px"),
        ({"model": "dinov2_vitb14", "image_size": "1036"}, "dinov2_vit_base_14 at 1036/1036 px"),
    ],
)
def test_a_run_that_has_no_published_row_of_its_encoder_and_size_is_named(tmp_path, flags, differs):
    model = ("--model", flags["model"]) if "model" in flags else ()
    _, notes = table_of(varad(tmp_path, *model, image_size=flags.get("image_size", "1024")))
    said = [note for note in notes if "differs from the published rows" in note]
    assert said == ([f"VarAD-Single-Class differs from the published rows: {differs}."] if differs else [])


def test_runs_stand_beside_published_rows_on_maps_of_their_size_alone(tmp_path):
    inp = make_run(tmp_path, ROWS)
    usual, small = varad(tmp_path), varad(tmp_path, "--metric_size", "256", "--save_name", "small")
    assert set(methods_of(inp)) == {"INP-Former", "Dinomaly"}
    assert methods_of(usual) == list(PIXELS)
    assert methods_of(small) == methods_of(inp)
    assert set(methods_of(inp, usual)) == {*methods_of(inp), *PIXELS}


def test_published_rows_of_two_protocols_are_said_to_be_not_comparable(tmp_path):
    runs = make_run(tmp_path, ROWS), varad(tmp_path, image_size="512")
    _, notes = table_of(*runs)
    published = [note for note in notes if note.startswith("Published")]
    assert [note.split(" px unless")[0] for note in published[:2]] == [
        "Published on maps of 256 px: dinov2reg_vit_base_14 at 448/392",
        "Published on maps of the size of the images: dinov2_vit_small_14 at 1024",
    ]
    assert published[2:] == [
        "Published rows on maps of different sizes are not comparable, nor is a run with those of another size."
    ]
    differs = [note for note in notes if "differs from" in note]
    assert differs == ["VarAD-Single-Class differs from the published rows: dinov2_vit_small_14 at 504/504 px."]
    assert any(warning.startswith("PROTOCOLS DIFFER") for warning in compare_runs(runs).warnings)


OTHERWISE = [("--metric_size", "256"), ("--smoothing_border", "zeros"), ("--interpolation", "bilinear")]


@pytest.mark.parametrize("flags", OTHERWISE)
def test_runs_that_were_measured_otherwise_are_neither_compared_with_nor_averaged(tmp_path, flags):
    usual = varad(tmp_path)
    binary = varad(tmp_path, *flags, stage=1)
    second = varad(tmp_path, *flags, "--seed", "2", "--save_name", "second")
    (section,) = compare_runs([usual, binary, second]).sections
    assert [[part.run.folders[0] for part in group.parts] for group in section.groups] == [[usual], [second], [binary]]
    assert [group.pairs for group in section.groups] == [[], [], []]
    same = varad(tmp_path, *flags, "--save_name", "same")
    (section,) = compare_runs([usual, same, binary]).sections
    assert section.groups[-1].pairs[0][1].run.folders == (same,)


def test_rows_of_images_that_were_resized_otherwise_are_named(tmp_path):
    bicubic = varad(tmp_path)
    bilinear = varad(tmp_path, "--interpolation", "bilinear", "--save_name", "other")
    assert not any("resized" in note for note in table_of(bicubic)[1])
    (note,) = [note for note in table_of(bicubic, bilinear)[1] if "resized" in note]
    assert note == "The images of these rows were resized otherwise: bicubic: VarAD-Single-Class; bilinear: other."


def test_a_run_from_before_these_flags_has_the_values_of_then(tmp_path):
    old = make_run(tmp_path, ROWS)
    path = old / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for key in ("metric_size", "smoothing_border", "interpolation", "optimizer", "adam_beta1"):
        assert config.pop(key) is not None
    path.write_text(yaml.safe_dump(config))
    new = make_run(tmp_path, ROWS, "--seed", "2", "--save_name", "second")
    flags = ("--metric_size", "256", "--smoothing_border", "zeros", "--interpolation", "bilinear", "--save_name", "binary")
    binary = make_run(tmp_path, ROWS, *flags, stage=1)
    (section,) = compare_runs([old, new, binary]).sections
    assert [len(group.parts) for group in section.groups] == [2, 1]
    assert section.groups[1].pairs[0][1].run.folders == (old,)
    other = make_run(tmp_path, ROWS, "--metric_size", "0", "--save_name", "large", stage=1)
    (section,) = compare_runs([old, other]).sections
    assert section.groups[1].pairs == []


def varad_settings(argv):
    return settings_of(parse(base_parser("", VARAD, ["single", "multi"]), argv))


def test_the_preset_spells_out_the_authors_values_which_are_the_defaults_at_1024_px():
    path = REPOSITORY / "configs" / "table_varad.yaml"
    spelled = varad_settings(["--config", str(path)]).config
    assert spelled == varad_settings(["--image_size", "1024"]).config
    expected = {
        "encoder": "dinov2_vit_small_14", "input_size": 1022, "crop_size": 1022, "interpolation": "bicubic", "m": 4.0,
        "total_epochs": 10, "total_iters": None, "batch_size": 2, "learning_rate": 5e-4, "final_learning_rate": 5e-4,
        "weight_decay": 0.01, "adam_beta1": 0.5, "warmup_iters": 0, "clb_stage": 0, "metric_size": 0, "smoothing_sigma": 4.0,
        "smoothing_kernel": 33, "smoothing_border": "reflect", "max_ratio": 0.0, "preset": "released", "adapter": "linear",
    }  # fmt: skip
    assert {key: spelled[key] for key in expected} == expected
    left_open = {"encoder", "input_size", "crop_size", "total_iters"}
    assert set(yaml.safe_load(path.read_text())) >= expected.keys() - left_open
    assert path.read_text().startswith("# python VarAD.py --config configs/table_varad.yaml ")


@pytest.fixture
def table_script(tmp_path):
    """As in `tests.table_scripts`, with a DATA_ROOT that has MVTec-AD and BTAD."""
    for name in ("mvtec", "BTech_Dataset_transformed"):
        (tmp_path / "data" / name).mkdir(parents=True)
    run = table_runner(tmp_path)
    return lambda *arguments, **further: run("table_varad", *arguments, **further)


MODELS = ("vit_b_16", "mae_vit_b_16", "clip_vit_b_16", "dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14")


@pytest.mark.parametrize(("table", "models"), [("II", ["dinov2_vits14"]), ("III", ["dinov2_vits14"]), ("IV", MODELS)])
def test_a_table_trains_each_model_on_each_data_set_that_is_there_and_reports_all(table_script, tmp_path, table, models):
    root = tmp_path / "data"
    code, commands, started = table_script(table, str(root))
    start = "VarAD.py --config configs/table_varad.yaml --dataset"
    end = "--save_dir runs --resume"
    paths = {"MVTec-AD": root / "mvtec", "BTAD": root / "BTech_Dataset_transformed"}
    assert commands[:-1] == [
        f"{start} {dataset} --data_path {path} --phase train --image_size 1024 --model {model} {end}".split()
        for model in models
        for dataset, path in paths.items()
    ]
    assert commands[-1][:2] == ["-m", "scripts.report"]
    assert commands[-1][-4:] == f"--output runs/table_varad_{table}.md --html runs/table_varad_{table}.html".split()
    assert len(commands[-1][2:-4]) == len(models) * len(DATASETS)
    assert {str(varad_settings(command[1:]).run_path) for command in commands[:-1]} <= set(commands[-1])
    assert "VisA is left out" in started.stdout
    assert "BTAD is left out" not in started.stdout
    assert code == 0


def test_the_environment_of_the_other_tables_reaches_the_trainings(table_script, tmp_path):
    environment = {
        "VISA_PATH": "d/visa", "DATASETS": "VisA", "ITEMS": "candle", "ITERS": "5", "IMAGE_SIZE": "517", "SEEDS": "1 2",
        "ENCODER": "dinov2reg_vit_base_14", "ENCODER_WEIGHTS": "w.pth", "NPROC": "2", "EXTRA": "--m 2 --device cpu",
    }  # fmt: skip
    _, commands, _ = table_script("II", str(tmp_path), **environment)
    start = (
        "-m torch.distributed.run --nproc_per_node 2 -- VarAD.py --config configs/table_varad.yaml --dataset VisA --data_path"
    )
    end = (
        "--item candle --total_iters 5 --save_dir runs --encoder dinov2reg_vit_base_14 --encoder_weights w.pth --resume --m 2 "
        "--device cpu --batch_size 1"
    )
    first = f"{start} d/visa --phase train --image_size 517"
    assert commands[:-1] == [
        f"{first} {end}".split(),
        f"{first} --seed 2 --save_name VarAD-Single-Class-seed2 {end}".split(),
    ]
    trained = [str(varad_settings(command[6:]).run_path) for command in commands[:-1]]
    assert trained == commands[-1][2:4]


def test_some_encoders_of_table_iv(table_script, tmp_path):
    environment = {"MODELS": "dinov2_vitb14", "ENCODER_WEIGHTS": "w.pth", "DATASETS": "BTAD"}
    _, commands, _ = table_script("IV", str(tmp_path / "data"), EXTRA="--image_size 512", **environment)
    assert len(commands) == 2
    assert "_Encoder=dinov2_vit_base_14_Resize=504_Crop=504" in commands[1][2]
    assert str(varad_settings(commands[0][1:]).run_path) == commands[1][2]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "II, III or IV, not ''"),
        (["V", "data"], {}, "II, III or IV, not 'V'"),
        (["--tables", "data"], {}, "not '--tables'"),
        (["II"], {}, "needs one folder"),
        (["II", "data", "more"], {}, "needs one folder"),
        (["II", "absent"], {}, "'absent' is no folder"),
        (["II", "."], {}, "no data set of MVTec-AD VisA BTAD DTD-Synthetic lies in '.'"),
        (["II", "data"], {"IMAGE_SIZE": "1k"}, "IMAGE_SIZE '1k' is no number"),
        (["II", "data"], {"DATASETS": "BTAD MPDD"}, "DATASETS names 'MPDD'"),
        (["II", "data"], {"ENCODER": "resnet"}, "ENCODER 'resnet' is no encoder"),
        (["II", "data"], {"NPROC": "4"}, "NPROC=4 processes cannot share --batch_size 2"),
        (["IV", "data"], {"ENCODER": "dinov2_vit_base_14"}, "MODELS instead of ENCODER"),
        (["IV", "data"], {"ENCODER_WEIGHTS": "w.pth"}, "ENCODER_WEIGHTS is for one encoder"),
        (["IV", "data"], {"MODELS": "dinov2_vitg14"}, "MODELS names 'dinov2_vitg14'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(table_script, tmp_path, arguments, environment, message):
    arguments = [str(tmp_path / "data") if argument == "data" else argument for argument in arguments]
    code, commands, started = table_script(*arguments, **environment)
    assert (code, commands) == (2, [])
    assert started.stderr.startswith("error: ")
    assert started.stderr.count("\n") == 1
    assert message in started.stderr


def test_the_script_explains_itself(table_script):
    code, commands, started = table_script("--help")
    assert (code, commands) == (0, [])
    assert "bash scripts/table_varad.sh II|III|IV DATA_ROOT" in started.stdout
    assert all(dataset in started.stdout for dataset in DATASETS)


def test_a_real_table_in_miniature(tmp_path):
    data, out = tmp_path / "data", tmp_path / "runs"
    make_mvtec(data / "mvtec")
    environment = {
        "PYTHON": sys.executable, "ITEMS": "bottle", "ITERS": "2", "SAVE_DIR": str(out), "IMAGE_SIZE": "64",
        "ENCODER": "random_vit_tiny_14", "OMP_NUM_THREADS": "1", "EXTRA": "--m 1 --num_workers 0 --device cpu",
    }  # fmt: skip
    code, _, started = table_runner(tmp_path)("table_varad", "II", str(data), **environment)
    assert code == 0, started.stderr
    lines = {line["name"]: line for line in csv.DictReader((out / "table_varad_II.csv").open()) if line["item"] == "Mean"}
    assert (lines["VarAD"]["P-F1"], lines["VarAD"]["I-F1"]) == ("63.8", "92.6")
    ours = lines["VarAD-Single-Class"]
    assert (ours["crop_size"], ours["metric_size"], ours["categories"]) == ("56", "0", "1")
    assert all(float(ours[name]) > 0 for name in (*PIXEL_COLUMNS, *IMAGE_COLUMNS))
    assert (out / "table_varad_II.md").read_text().count("nothing is trained yet") == 3
