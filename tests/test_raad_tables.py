"""RAAD's tables: published figures with their errors, TRUE and FALSE, and the commands that train for them."""

import csv
import re

import pytest
import yaml

from common.errors import UserError
from datasets.catalog import LAYOUTS
from RAAD import main
from scripts import report
from tests.conftest import REPOSITORY
from tests.miniature import make_mvtec
from tests.run_folders import make_run, row
from tests.table_scripts import table_runner
from utils.arguments import base_parser, parse
from utils.comparison import compare_runs
from utils.comparison_csv import write_csv
from utils.comparison_tables import category_table, claim_lines, result_table
from utils.hosts import RAAD, VARAD
from utils.published import MEAN, PUBLISHED_FILE, read_published
from utils.raad_arguments import stages_of
from utils.settings import settings_of

ROWS = {"bottle": row(0.9, P_AUROC=0.97, AUPRO=0.6)}


def settings(*flags: str, host=RAAD):
    return settings_of(parse(base_parser("", host, ["single"]), list(flags)))


# published figures

NAMES = ("RAAD", "RAAD, baseline 32/32", "RAAD, LSQ 8/8", "RAAD, OMPQ 8/8")
# I-AUROC/I-AP/AUPRO of the columns above as the paper prints them, tables 1 and 9
PRINTED = {
    ("MVTec-AD", MEAN): "98.90/97.83/92.92 96.98/97.44/91.38 97.21/96.58/86.19 98.77/97.97/92.17",
    ("MVTec-AD", "bottle"): "100/100/93.97 100/100/94.58 99.92/98.32/88.82 100/100/93.92",
    ("MVTec-AD", "cable"): "97.71/94.51/88.75 95.16/100/94.58 95.25/86.34/87.39 96.49/90.72/86.80",
    ("MVTec-AD", "zipper"): "97.84/94.44/97.84 95.24/94.43/91.67 97.05/94.18/92.15 96.95/95.16/92.05",
    ("MVTec-LOCO", MEAN): "89.75/87.85/86.76 84.09/78.51/83.32 86.26/82.34/81.16 89.60/88.59/86.19",
    ("MVTec-LOCO", "pushpins"): "95.85/91.18/91.09 78.35/68.12/88.23 78.97/85.03/83.47 95.46/90.59/90.86",
    ("MVTec-LOCO", "splicing_connectors"): "97.83/98.89/94.72 97.03/78.51/94.53 97.56/94.76/94.50 97.75/95.29/94.74",
    ("VisA", MEAN): "96.72/92.05/ 94.73/88.79/",
    ("VisA", "cashew"): "98.14/95.05/ 86.15/76.03/",
    ("VisA", "pipe_fryum"): "99.72/99.00/ 99.54/98.00/",
}
# of rows whose printed mean is not theirs: what they average
RECOMPUTED = {
    ("RAAD, baseline 32/32", "MVTec-AD", "I-AP"): "97.94",
    ("RAAD, baseline 32/32", "MVTec-AD", "AUPRO"): "91.91",
    ("RAAD, baseline 32/32", "MVTec-LOCO", "I-AP"): "75.64",
    ("RAAD, baseline 32/32", "MVTec-LOCO", "AUPRO"): "84.28",
    ("RAAD, baseline 32/32", "VisA", "I-AUROC"): "94.83",
    ("RAAD", "VisA", "I-AP"): "92.45",
}
OF_RAAD = [published for published in read_published().rows if published.host == "RAAD"]


def test_the_published_figures_are_the_papers():
    found = {(line.method, line.dataset, line.item): line for line in OF_RAAD if line.kind == "published"}
    for (dataset, item), cells in PRINTED.items():
        for method, cell in zip(NAMES, cells.split(), strict=False):
            line = found[method, dataset, item]
            assert [line.metrics[name] for name in ("I-AUROC", "I-AP", "AUPRO")] == cell.split("/")
            assert (line.setting, line.encoder, line.input_size, line.metric_size) == ("single-class", "pdn_small", "256", 0)
    pixels = [(line.method, line.metrics["P-AUROC"]) for line in OF_RAAD if line.metrics["P-AUROC"]]
    table_2 = {"PatchCore": "98.1", "SimpleNet": "98.1", "RealNet": "99.0", "RAAD": "97.9", "RAAD, baseline 32/32": "97.1"}
    assert dict(pixels) == table_2
    assert len(pixels) == len(table_2)
    others = {(line.method, line.dataset): line.metrics["I-AUROC"] for line in OF_RAAD if line.item == MEAN}
    assert [others["EfficientAD-S", dataset] for dataset in ("MVTec-AD", "MVTec-LOCO", "VisA")] == ["98.8", "90.0", "97.5"]
    assert others["EfficientAD-M, nelson1425", "VisA"] == "98.2"


def test_a_printed_mean_is_that_of_its_rows_or_its_note_says_what_they_average():
    wrong = {}
    for mean in (line for line in OF_RAAD if line.item == MEAN):
        same = [line for line in OF_RAAD if (line.kind, line.method, line.dataset) == (mean.kind, mean.method, mean.dataset)]
        if len(same) == 1 + len(LAYOUTS[mean.dataset].published_items):
            for name in ("I-AUROC", "I-AP", "AUPRO"):
                values = [float(line.metrics[name]) for line in same if line.item != MEAN and line.metrics[name]]
                if values and abs(sum(values) / len(values) - float(mean.metrics[name])) > 0.03:
                    wrong[mean.method, mean.dataset, name] = f"{sum(values) / len(values):.2f}", mean.note
    assert wrong.keys() == RECOMPUTED.keys()
    for place, (average, note) in wrong.items():
        assert abs(float(average) - float(RECOMPUTED[place])) < 0.011  # halves are rounded either way
        assert RECOMPUTED[place] in note


def test_what_is_wrong_with_a_published_row_is_said():
    notes = {(line.method, line.dataset, line.item): line.note for line in OF_RAAD if line.note}
    assert "1.20 is a misprint of 1.39" in notes["RAAD", "MVTec-AD", MEAN]
    assert "0.50, 0.75, 1.00 and 2.01 M" in notes["RAAD, LSQ 8/8", "MVTec-AD", MEAN]
    assert "those of bottle" in notes["RAAD, baseline 32/32", "MVTec-AD", "cable"]
    assert "97.84 is the I-AUROC" in notes["RAAD", "MVTec-AD", "zipper"]
    assert "that of capsules" in notes["RAAD, baseline 32/32", "VisA", "cashew"]
    assert all(re.search(r"[a-z0-9]$", note) for note in notes.values())  # the report ends them


def test_a_host_that_there_is_not_is_refused(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED_FILE.read_text().replace('table 9",RAAD,', 'table 9",RADD,', 1))
    with pytest.raises(UserError, match=r"line \d+ of .*host 'RADD' is none of INP-Former Dinomaly VarAD RAAD"):
        read_published(path)


# reports


def raad(root, *flags, rows=ROWS, **further):
    return make_run(root, rows, "--true_false", "f1max", *flags, host=RAAD, **further)


def section_of(*folders):
    (section,) = compare_runs(folders).sections
    return section


def methods_of(*folders):
    rows = result_table(section_of(*folders), read_published()).rows
    return [line[0] for line in rows[1:] if line[1] != "ours"]


def test_published_rows_stand_beside_runs_of_their_host_alone(tmp_path):
    ours = raad(tmp_path)
    varad = make_run(tmp_path, ROWS, "--image_size", "1024", host=VARAD)
    assert set(methods_of(ours)) == {line.method for line in OF_RAAD if line.dataset == "MVTec-AD"}
    assert methods_of(ours)[0] == "RAAD"
    assert "VarAD" in methods_of(varad)
    assert not set(methods_of(varad)) & set(NAMES)
    assert methods_of(varad, ours) == [*methods_of(varad), *methods_of(ours)]
    small = raad(tmp_path, "--metric_size", "256", "--save_name", "small")
    assert set(methods_of(small)) == {"INP-Former", "Dinomaly", *methods_of(make_run(tmp_path, ROWS))}


def test_each_run_is_measured_by_the_rows_of_its_host(tmp_path):
    ours, varad = raad(tmp_path), make_run(tmp_path, ROWS, "--image_size", "1024", host=VARAD)
    medium = raad(tmp_path, "--encoder", "pdn_tiny", "--save_name", "tiny")
    notes = result_table(section_of(ours, varad, medium), read_published()).notes
    assert [note for note in notes if "differs from" in note] == [
        "tiny (RAAD) differs from the published rows: pdn_tiny at 256/256 px."
    ]
    published = [note for note in notes if note.startswith("Published on")]
    assert [re.search(r"images: (\S+ at \d+)", note)[1] for note in published] == [
        "dinov2_vit_small_14 at 1024",
        "pdn_small at 256",
    ]


def test_notes_stand_below_the_table_of_their_row(tmp_path):
    section = section_of(raad(tmp_path, rows={"bottle": row(0.9), "cable": row(0.8)}))
    published = read_published()
    means, categories = (table(section, published).notes for table in (result_table, category_table))
    assert any(note.startswith("RAAD, baseline 32/32: the rows average I-AP 97.94 and AUPRO 91.91;") for note in means)
    assert categories == ("RAAD, baseline 32/32 on cable: I-AP and AUPRO are those of bottle, probably copied.",)
    write_csv(tmp_path / "table.csv", compare_runs(section.parts[0].run.folders), published)
    sources = [line["source"] for line in csv.DictReader((tmp_path / "table.csv").open()) if line["item"] == "cable"]
    assert any("RAAD paper, table 1; I-AP and AUPRO are those of bottle" in source for source in sources)


def test_true_and_false_are_columns_of_the_report(tmp_path):
    section = section_of(raad(tmp_path, rows={"bottle": row(0.9, P_TRUE=0.876, P_FALSE=0.351)}))
    header, *lines = result_table(section, read_published()).rows
    ours = dict(zip(header, lines[-1], strict=True))
    assert (ours["P-TRUE"], ours["P-FALSE"]) == ("87.60", "35.10")
    assert dict(zip(header, lines[0], strict=True))["P-TRUE"] == "-"


def test_quantized_runs_of_several_seeds_belong_together_though_their_baselines_have_other_names(tmp_path):
    quantized = [
        raad(
            tmp_path,
            "--seed",
            seed,
            "--save_name",
            f"RAAD-hqs{end}-Quantized",
            "--baseline",
            f"RAAD-Single-Class{end}",
            stage=1,
        )
        for seed, end in (("1", ""), ("2", "-seed2"))
    ]
    (group,) = section_of(*quantized).groups
    assert (len(group.parts), group.name) == (2, "RAAD-hqs-Quantized")
    other = raad(tmp_path, "--seed", "3", "--save_name", "RAAD-hqs-seed3-Quantized", "--baseline", "another", stage=1)
    assert len(section_of(*quantized, other).groups) == 2


def test_claims_about_binary_networks_are_not_held_against_quantized_ones(tmp_path):
    section = section_of(raad(tmp_path, stage=1), make_run(tmp_path, ROWS, stage=1))
    (line,) = claim_lines(section, read_published().claims)
    assert "INP-Former-Single-Class" in line
    assert "RAAD" not in line


# the table script and its preset

DATASETS = ("MVTec-AD", "MVTec-LOCO", "VisA")
VARIANTS = {
    "float": "--allocation none",
    "uniform8": "--allocation uniform --bits 8",
    "lsq8": "--allocation uniform --bits 8 --ends_bits 8 --autoencoder_bits 8 --rounding lsq",
    "hqs": "--allocation hqs",
}
TABLES = {
    "1": (DATASETS[:2], ("float", "lsq8", "uniform8", "hqs")),
    "2": (DATASETS, ("float", "hqs")),
    "3": (DATASETS[:1], ("float", "uniform8", "hqs")),
    "9": (DATASETS[2:], ("float", "hqs")),
}


def test_the_preset_spells_out_efficientads_and_the_papers_values_which_are_the_defaults():
    path = REPOSITORY / "configs" / "table_raad.yaml"
    spelled = settings("--config", str(path)).config
    assert spelled == settings("--image_size", "256", "--true_false", "f1max").config
    expected = {
        "encoder": "pdn_small", "input_size": 256, "crop_size": 256, "map_normalisation": "quantile", "holdout": 0.1,
        "total_iters": 70_000, "batch_size": 1, "optimizer": "adam", "learning_rate": 1e-4, "final_learning_rate": 1e-5,
        "schedule": "step", "weight_decay": 1e-5, "hard_quantile": 0.999, "allocation": "hqs", "ends_bits": 8,
        "autoencoder_bits": None, "recon_iters": 20_000, "recon_activation_iters": 5_000, "finetune_iters": 60_000,
        "finetune_learning_rate": 1e-5, "metric_size": 0, "smoothing_kernel": 0, "max_ratio": 0.0, "true_false": "f1max",
    }  # fmt: skip
    assert {key: spelled[key] for key in expected} == expected
    named = yaml.safe_load(path.read_text())
    assert named.keys() >= expected.keys() - {"input_size", "crop_size"}
    assert named.keys() >= {flag for flag in RAAD.training_flags if flag not in ("baseline", "bits", "budget")}
    assert path.read_text().startswith("# python RAAD.py --config configs/table_raad.yaml ")


@pytest.fixture
def table_script(tmp_path):
    """As in `tests.table_scripts`, with a DATA_ROOT that has all three data sets."""
    for name in ("mvtec", "mvtec_loco", "visa"):
        (tmp_path / "data" / name).mkdir(parents=True)
    run = table_runner(tmp_path)
    return lambda *arguments, **further: run("table_raad", *arguments, **further)


def stages(command: list[str]) -> list:
    """Settings of the stages of a command line of RAAD.py."""
    arguments = parse(base_parser("", RAAD, ["single"]), command)
    return [settings_of(stage) for stage in stages_of(arguments, "RAAD-Single-Class")]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_trains_each_baseline_once_and_its_variants_from_it_and_reports_all(table_script, tmp_path, table):
    datasets, variants = TABLES[table]
    root = tmp_path / "data"
    code, commands, _ = table_script(table, str(root), "teacher.pth")
    paths = dict(zip(DATASETS, (root / "mvtec", root / "mvtec_loco", root / "visa"), strict=True))
    expected = []
    for dataset in datasets:
        start = f"RAAD.py --config configs/table_raad.yaml --dataset {dataset} --data_path {paths[dataset]} --phase train"
        start += " --image_size 256 --save_name"
        end = "--save_dir runs --encoder_weights teacher.pth --resume"
        expected.append(f"{start} RAAD-Single-Class --stage baseline {end}")
        expected += [
            f"{start} RAAD-{name} --stage all --baseline RAAD-Single-Class {VARIANTS[name]} {end}" for name in variants
        ]
    assert commands[:-1] == [line.split() for line in expected]
    trained = [stage for command in commands[:-1] for stage in stages(command[1:])]
    assert commands[-1] == [
        *("-m", "scripts.report"),
        *(str(stage.run_path) for stage in trained),
        *("--output", f"runs/table_raad_{table}.md", "--html", f"runs/table_raad_{table}.html"),
    ]
    assert len({stage.run_path for stage in trained}) == len(trained) == len(datasets) * 2 * len(variants)
    baselines = [stage for stage in trained if stage.model.stage == 0]
    assert len(baselines) == len(datasets)
    for stage in trained:
        source = stage.model.load_checkpoint
        assert source is None or stage.run_path_of(source) in {other.run_path for other in trained}
    assert code == 0


def test_the_table_of_bits_has_learned_steps_uniform_bits_and_scores(table_script, tmp_path):
    _, commands, _ = table_script("4", str(tmp_path / "data"))
    made = [stage.config for command in commands[2:-1] for stage in stages(command[1:]) if stage.model.stage == 1]
    keys = ("allocation", "bits", "ends_bits", "autoencoder_bits", "rounding")
    found = [tuple(config[key] for key in keys) for config in made]
    lsq = [("uniform", [bits], bits, bits, "lsq") for bits in (2, 3, 4, 8)]
    uniform = [("uniform", [bits], 8, None, "adaround") for bits in (2, 3, 4, 8)]
    assert found == [*lsq, *uniform, ("hqs", None, 8, None, "adaround")]


def test_the_environment_reaches_the_trainings(table_script, tmp_path):
    environment = {
        "VISA_PATH": "d/visa", "DATASETS": "VisA", "ITEMS": "candle", "ITERS": "5", "IMAGE_SIZE": "128", "SEEDS": "1 2",
        "VARIANTS": "ompq", "ENCODER": "pdn_tiny", "EXTRA": "--device cpu",
    }  # fmt: skip
    _, commands, _ = table_script("1", str(tmp_path), "random", **environment)
    start = "RAAD.py --config configs/table_raad.yaml --dataset VisA --data_path d/visa --phase train --image_size 128"
    lengths = "--recon_iters 5 --recon_activation_iters 5 --finetune_iters 5"
    end = "--item candle --total_iters 5 --save_dir runs --encoder pdn_tiny --encoder_weights random --resume --device cpu"
    expected = []
    for seed, suffix in (("", ""), (" --seed 2", "-seed2")):
        expected += [
            f"{start} --save_name RAAD-Single-Class{suffix}{seed} {lengths} --stage baseline {end}",
            f"{start} --save_name RAAD-ompq{suffix}{seed} {lengths} --stage all --baseline RAAD-Single-Class{suffix} "
            f"--allocation ompq {end}",
        ]
    assert commands[:-1] == [line.split() for line in expected]
    trained = [stage for command in commands[:-1] for stage in stages(command[1:])]
    assert commands[-1][2:-4] == [str(stage.run_path) for stage in trained]
    assert [stage.config["total_iters"] for stage in trained] == [5, 0, 5] * 2


def test_what_is_not_there_is_left_out_and_a_failure_is_reported(table_script, tmp_path):
    (tmp_path / "data" / "mvtec_loco").rmdir()
    code, commands, started = table_script("1", str(tmp_path / "data"), codes={"RAAD-lsq8": 1})
    assert "MVTec-LOCO is left out" in started.stdout
    assert len(commands) == 1 + 4 + 1
    assert len(commands[-1][2:-4]) == 2 * 8
    assert code == 1
    assert "failed with exit code 1" in started.stderr
    code, commands, _ = table_script("1", str(tmp_path / "data"), codes={"RAAD-lsq8": 130})
    assert (code, len(commands)) == (130, 3)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "1, 2, 3, 4 or 9, not ''"),
        (["5", "data"], {}, "1, 2, 3, 4 or 9, not '5'"),
        (["1"], {}, "needs one folder"),
        (["1", "data", "teacher", "more"], {}, "at most a TEACHER"),
        (["1", "absent"], {}, "'absent' is no folder"),
        (["1", "."], {}, "no data set of MVTec-AD MVTec-LOCO lies in '.'"),
        (["1", "data"], {"DATASETS": "BTAD"}, "DATASETS names 'BTAD'; choose from MVTec-AD MVTec-LOCO VisA"),
        (["1", "data"], {"VARIANTS": "hqs lsq9"}, "VARIANTS names 'lsq9'"),
        (["1", "data"], {"IMAGE_SIZE": "1k"}, "IMAGE_SIZE '1k' is no number"),
        (["1", "data"], {"NPROC": "2"}, "NPROC=2 processes cannot share a batch of one image"),
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
    assert "bash scripts/table_raad.sh 1|2|3|4|9 DATA_ROOT [TEACHER]" in started.stdout
    for table, (datasets, variants) in TABLES.items():
        assert re.search(rf"^  {table} +{' '.join(datasets)} +{' '.join(variants)}$", started.stdout, re.MULTILINE)


def test_a_real_table_in_miniature(table_script, tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "runs"
    make_mvtec(data / "mvtec", train=15)
    environment = {
        "ITEMS": "bottle", "ITERS": "2", "SAVE_DIR": str(out), "IMAGE_SIZE": "64", "ENCODER": "pdn_tiny", "VARIANTS": "hqs",
        "EXTRA": "--num_workers 0 --device cpu --calibration_images_count 2 --rounding nearest",
    }  # fmt: skip
    _, commands, _ = table_script("3", str(data), "random", **environment)
    monkeypatch.chdir(REPOSITORY)  # where the script calls them
    assert [command[0] for command in commands] == ["RAAD.py", "RAAD.py", "-m"]
    assert [main(command[1:]) for command in commands[:-1]] == [0, 0]
    assert report.main(commands[-1][2:]) == 0
    lines = {line["name"]: line for line in csv.DictReader((out / "table_raad_3.csv").open()) if line["item"] == MEAN}
    assert lines["RAAD, OMPQ 8/8"]["AUPRO"] == "92.17"
    ours = [lines[name] for name in ("RAAD-Single-Class-Baseline", "RAAD-hqs-Quantized", "RAAD-hqs")]
    assert [line["stage"] for line in ours] == ["0", "1", "2"]
    for line in ours:
        assert all(0 <= float(line[name]) <= 100 for name in ("I-AUROC", "AUPRO", "P-TRUE", "P-FALSE"))
    assert [line["float run"] for line in ours] == ["", *["RAAD-Single-Class-Baseline"] * 2]
    text = (out / "table_raad_3.md").read_text()
    assert re.search(r"RAAD-hqs-Quantized: 0\.\d{3} M effective parameters .* mean of 1 models", text)
    assert "at scores &gt;= the threshold of its best P-F1" in text
