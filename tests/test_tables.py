"""Tables of a comparison in every form, published rows, presets, and the shell scripts that fill the paper's tables."""

import csv
import json
import re
import sys

import pytest
import yaml

from common.errors import UserError
from datasets.catalog import LAYOUTS
from scripts import report
from tests.conftest import REPOSITORY
from tests.miniature import make_mvtec
from tests.run_folders import make_run, row
from tests.table_scripts import table_runner
from utils.arguments import base_parser, parse
from utils.comparison import compare_runs
from utils.comparison_tables import category_table, claim_lines, cost_table, overview, provenance_table, result_table
from utils.hosts import DINOMALY, INP_FORMER
from utils.metrics import METRIC_NAMES
from utils.protocol import EvaluationOptions
from utils.published import PUBLISHED_FILE, read_published
from utils.result_files import write_pixel_errors
from utils.settings import settings_of
from utils.tables import Table

NAME = "INP-Former-Multi-Class"


def section_of(*folders):
    (section,) = compare_runs(folders).sections
    return section


def records(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.rows[0], cells, strict=True)) for cells in table.rows[1:]]


@pytest.fixture
def half_table(tmp_path):
    """Multi-class MVTec-AD: float with three categories, stage 2 with two of them."""
    rows = {"bottle": row(0.9, AUPRO=0.6), "cable": row(0.8, AUPRO=0.5), "carpet": row(0.7)}
    return [
        make_run(tmp_path, {"bottle": row(0.85), "cable": row(0.81, AUPRO=0.4)}, setting="multi", stage=2),
        make_run(tmp_path, rows, setting="multi"),
    ]


def test_published_rows_are_the_papers():
    published = read_published()
    tables = {
        ("multi-class", "Real-IAD", "INP-Former"): "90.5 88.1 81.5 99.0 47.5 50.3 95.0",
        ("super-multi-class", "VisA", "INP-Former"): "97.3 97.8 94.1 98.4 51.4 54.7 92.4",
        ("few-shot 1", "Real-IAD", "INP-Former"): "67.5 63.1 66.1 94.9 20.0 25.8 81.8",
        ("few-shot 4", "MVTec-AD", "INP-Former"): "97.6 98.6 97.0 97.0 65.9 65.6 92.9",
        ("zero-shot", "VisA", "INP-Former"): "67.5 71.6 75.0 88.7 7.8 11.8 67.2",
        ("multi-class", "VisA", "Dinomaly"): "98.7 98.9 96.2 98.7 53.2 55.7 94.5",
    }
    for (setting, dataset, method), numbers in tables.items():
        (found,) = [r for r in published.of(setting, dataset) if r.method == method and r.item == "Mean"]
        assert list(found.metrics.values()) == numbers.split()
        assert (found.kind, found.encoder, found.input_size) == ("published", "dinov2reg_vit_base_14", "448")
    single = {(r.method, r.dataset): r.metrics for r in published.rows if r.setting == "single-class" and r.item == "Mean"}
    assert single["Dinomaly", "Real-IAD"]["P-AP"] == "45.2"
    assert single["INP-Former", "VisA"]["AUPRO"] == "93.8"
    others = {(r.method, r.dataset): r.metrics["I-AUROC"] for r in published.of("multi-class", "Real-IAD")}
    assert (others["RD4AD", "Real-IAD"], others["UniAD", "Real-IAD"], others["MambaAD", "Real-IAD"]) == ("82.4", "83.0", "86.3")
    reproduced = [r for r in published.of("few-shot 1", "MVTec-AD") if r.kind == "reproduced"]
    assert [r.metrics["P-AP"] for r in reproduced] == ["63.97"]
    (claim,) = published.claims
    assert (claim.method, claim.size_ratio, claim.flops_ratio, claim.auroc_loss) == ("BinaryAD", 6.53, 7.99, 1.1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("published,INP-Former,multi-class,VisA,Mean,98.9", "published,INP-Former,multi-class,VisA,Mean,0.989", "percent"),
        ("published,INP-Former,multi-class,VisA", "published,INP-Former,multiclass,VisA", "setting"),
        ("published,INP-Former,multi-class,VisA", "published,INP-Former,multi-class,ViSA", "dataset"),
        ("published,INP-Former,multi-class,VisA", "measured,INP-Former,multi-class,VisA", "kind"),
        ("published,INP-Former,multi-class,VisA", "published,INP-Former,multi-class,MVTec-AD", "twice"),
        ("MVTec-AD,cable,91.7", "MVTec-AD,cabel,91.7", "item"),
        ("MVTec-AD,cable,91.7", "MVTec-AD,cable,good", "float"),
        ("MVTec-AD,cable,91.7", "MVTec-AD,cable,", "no metric"),
        ("README of jj258/BinaryAD", "", "source"),
        ("dinov2_vit_small_14,1024,,0,", "dinov2_vit_small_14,1024,,,", "metric_size"),
        ("kind,method", "sort,method", "columns"),
        ("MVTec-AD,cable,91.7", "MVTec-AD,91.7", "cells"),
    ],
)
def test_a_wrong_published_row_is_refused(tmp_path, old, new, message):
    text = PUBLISHED_FILE.read_text()
    assert old in text
    path = tmp_path / "published.csv"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_published(path)


def test_results_stand_below_published_rows_with_their_difference_to_float(half_table):
    table = result_table(section_of(*half_table), read_published())
    lines = records(table)
    published, ours = [line for line in lines if line["kind"] != "ours"], lines[-2:]
    assert published == lines[:-2]
    assert published[0]["method or run"] == "INP-Former"
    assert published[0]["I-AUROC"] == "99.7"
    assert [line["method or run"] for line in ours] == [f"{NAME}-FP", f"{NAME}-CLB2"]
    assert (ours[0]["I-AUROC"], ours[0]["AUPRO"], ours[0]["P-AP"]) == ("80.00", "55.00", "n/a")
    assert (ours[1]["I-AUROC"], ours[1]["AUPRO"]) == ("83.00 (-2.00)", "40.00 (-10.00)")
    assert [line["categories"] for line in ours] == ["3 of 15†", "2 of 15†"]
    assert ours[1]["compared with float over"] == f"2 categories ({NAME}-FP)"
    assert "c0ffee" in ours[0]["source"]
    assert any(note.startswith("† Mean over fewer categories") for note in table.notes)
    assert not any("differs from" in note for note in table.notes)


def test_a_run_of_other_sizes_is_said_to_differ_from_published_rows(tmp_path):
    run = make_run(tmp_path, {"bottle": row(0.9)}, "--encoder", "dinov2reg_vit_small_14", setting="multi")
    notes = result_table(section_of(run), read_published()).notes
    assert f"{NAME}-FP differs from the published rows: dinov2reg_vit_small_14 at 448/392 px." in notes


@pytest.mark.parametrize("split", ["realiad_jsons", "realiad_jsons_sv"])
def test_another_split_of_real_iad_is_said_to_be_not_comparable(tmp_path, split):
    flags = ("--dataset", "Real-IAD", "--realiad_json", split)
    section = section_of(make_run(tmp_path, {"audiojack": row(0.9)}, *flags, setting="multi"))
    said = [note for note in result_table(section, read_published()).notes if "split" in note]
    line = f"{NAME}-FP is not comparable with the published rows: split {split} of Real-IAD, theirs is realiad_jsons."
    assert said == ([] if split == "realiad_jsons" else [line])
    output = ["--csv", str(tmp_path / "table.csv"), "--html", str(tmp_path / "page.html")]
    assert report.main([*(str(folder) for folder in section.parts[0].run.folders), *output]) == 0
    lines = [line for line in csv.DictReader((tmp_path / "table.csv").open()) if line["kind"] != "claim"]
    assert {line["realiad_json"] for line in lines if line["kind"] == "run"} == {split}
    assert {line["realiad_json"] for line in lines if line["kind"] != "run"} == {"realiad_jsons"}


def test_pixel_metrics_from_bins_are_marked_in_every_form(half_table, tmp_path, capsys):
    write_pixel_errors(half_table[1] / "pixel_errors.csv", {"cable": 0.000153, "bottle": 0.0001, "hazelnut": 0.5})
    output = tmp_path / "table.md"
    assert report.main([*map(str, half_table), "--output", str(output), "--html", str(tmp_path / "page.html")]) == 0
    note = f"{NAME}-FP: pixel metrics of 2 of 3 categories come from bins, off by at most 0.02 points."
    for text in (output.read_text(), (tmp_path / "page.html").read_text(), capsys.readouterr().out):
        assert text.count("categories come from bins") == text.count(note) == 1
    lines = {(line["name"], line["item"]): line for line in csv.DictReader(output.with_suffix(".csv").open())}
    errors = {item: line["pixel_error"] for (name, item), line in lines.items() if name == f"{NAME}-FP"}
    assert errors == {"Mean": "0.0153", "bottle": "0.0100", "cable": "0.0153", "carpet": ""}
    assert {line["pixel_error"] for (name, _), line in lines.items() if name != f"{NAME}-FP"} == {""}


def test_every_folder_of_a_row_shows_where_its_numbers_come_from(tmp_path):
    runs = [
        make_run(tmp_path / "a", {"cable": row(0.8)}, "--batch_size", "4", processes=4),
        make_run(
            tmp_path / "b", {"bottle": row(0.9)}, "--batch_size", "4",
            commit="b" * 40 + "+changes", date="2026-02-03", device="cuda", encoder_source="file", processes=4,
        ),
        make_run(tmp_path, {"cable": row(0.8), "bottle": row(0.8)}, "--seed", "2", "--save_name", "two", commit="c" * 40),
    ]  # fmt: skip
    comparison = compare_runs(runs)
    lines = records(provenance_table(comparison.runs))
    assert [(line["commit"], line["date"], line["device"], line["weights"]) for line in lines] == [
        ("c0ffee", "2026-01-02", "cpu", "hub"),
        ("b" * 40 + "+changes", "2026-02-03", "cuda", "file"),
        ("c" * 40, "2026-01-02", "cpu", "hub"),
    ]
    assert [line["training"].split(", ")[1] for line in lines] == ["batch 16 (4 x 4)", "batch 16 (4 x 4)", "batch 16"]
    (ours,) = [line for line in records(result_table(comparison.sections[0], read_published())) if line["kind"] == "ours"]
    assert ours["seed"] == "n = 2 (1 2)"  # a step has 16 images in both
    assert ours["source"] == "commits c0ffee, bbbbbbbbbb+changes, cccccccccc"


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (("seed1-multi-float", "seed2-multi-float"), "multi-float"),
        ((f"{NAME}-FP", f"{NAME}-seed2-FP"), f"{NAME}-FP"),
        (("float-seed1", "float-seed2"), "float"),
        (("float_seed1", "float_seed2"), "float"),
        (("seed1", "seed2"), "seed1"),
        (("seed1-multi", "seed2-other"), "seed1-multi"),
        (("seed1-multi", "seed21-multi"), "seed1-multi"),
    ],
)
def test_the_name_of_several_seeds_has_no_seed(tmp_path, names, shared):
    runs = [
        make_run(tmp_path, {"bottle": row(0.9)}, "--seed", seed, "--save_name", name)
        for seed, name in zip("12", names, strict=True)
    ]
    assert overview(section_of(*runs)).rows[1][0] == f"{shared} (n=2)"


@pytest.mark.parametrize("names", [("seed1-float", "seed2-float"), ("x-FP", "x-seed2-FP")])
def test_binary_runs_are_averaged_though_their_teachers_names_carry_the_seed(tmp_path, names):
    runs = []
    for seed, name in zip("12", names, strict=True):
        flags = ("--seed", seed, "--save_name")
        runs.append(make_run(tmp_path, {"bottle": row(0.9)}, *flags, name))
        teacher = ("--distill", "1", "--distill_teacher", name)
        runs.append(make_run(tmp_path, {"bottle": row(0.9)}, *flags, f"binary{seed}", *teacher, stage=1))
    binary = records(result_table(section_of(*runs), read_published()))[-1]
    assert binary["seed"] == "n = 2 (1 2)"
    assert binary["compared with float over"] == f"1 categories ({'float' if 'float' in names[0] else 'x-FP'})"


def test_seeds_are_shown_as_mean_and_standard_deviation(tmp_path):
    runs = [
        make_run(tmp_path, {"bottle": row(0.90)}, setting="multi"),
        make_run(tmp_path, {"bottle": row(0.96)}, "--seed", "2", "--save_name", "other", setting="multi"),
    ]
    (line,) = [line for line in records(result_table(section_of(*runs), read_published())) if line["kind"] == "ours"]
    assert line["I-AUROC"] == "93.00 ± 4.24"
    assert line["seed"] == "n = 2 (1 2)"


def test_the_claim_stands_beside_our_ratios_and_difference(half_table):
    (line,) = claim_lines(section_of(*half_table), read_published().claims)
    assert "6.53x size, up to 7.99x FLOPs and at most 1.1 points" in line
    # decoder: 4000 bytes against (900 + 32 * 100) / 8 = 513; 2000 MACs against 1000 + 1000 / 64
    assert "decoder side 7.80x size and 1.97x MACs" in line
    assert "I-AUROC -2.00 against float over 2 of 15 categories" in line


def test_cost_and_milliseconds(half_table):
    timing = {"milliseconds": 12.345, "engine": "bits", "machine": ["CPU x"], "date": "2026-01-02"}
    (half_table[0] / "timing.json").write_text(json.dumps(timing))
    table = cost_table(section_of(*half_table))
    float_line, binary = records(table)
    assert (float_line["ms"], binary["ms"], binary["engine"]) == ("-", "12.3", "bits")
    assert binary["decoder side: size ratio"] == "7.80x"
    assert binary["whole model: MAC ratio"] == f"{6000 / (5000 + 1000 / 64):.2f}x"
    assert any("CPU x; 2026-01-02" in note for note in table.notes)
    assert not any("several measurements" in note for note in table.notes)
    (half_table[1] / "timing.json").write_text(json.dumps({**timing, "machine": ["CPU y"]}))
    assert any("several measurements" in note for note in cost_table(section_of(*half_table)).notes)


def test_categories_show_published_rows_ours_and_what_a_data_set_has_beyond_the_seven_metrics(tmp_path):
    runs = [
        make_run(tmp_path, {"bottle": row(0.9, AU_sPRO=0.5), "cable": row(0.8)}, setting="multi"),
        make_run(tmp_path, {"bottle": row(0.7, AU_sPRO=0.25)}, setting="multi", stage=1),
    ]
    section = section_of(*runs)
    lines = records(category_table(section, read_published()))
    assert [(line["category"], line["method or run"], line["stage"]) for line in lines] == [
        ("bottle", "Dinomaly", ""),
        ("bottle", f"{NAME}-FP", "0"),
        ("bottle", NAME, "1"),
        ("cable", "Dinomaly", ""),
        ("cable", f"{NAME}-FP", "0"),
    ]
    assert (lines[0]["P-AP"], lines[0]["AU-sPRO"]) == ("88.6", "-")
    assert (lines[2]["I-AUROC"], lines[2]["AU-sPRO"]) == ("70.00 (-20.00)", "25.00 (-25.00)")
    assert section.metrics == [*METRIC_NAMES, "AU-sPRO"]
    assert overview(section).rows[1][:4] == (f"{NAME}-FP", "0", "2/15", "85.00")


def test_command_writes_the_same_numbers_as_markdown_csv_and_html(half_table, tmp_path, capsys):
    output, absent = tmp_path / "out" / "table.md", tmp_path / "absent"
    runs = map(str, [*half_table, absent])
    assert report.main([*runs, "--output", str(output), "--html", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert f"missing: {absent}: nothing is trained yet" in printed
    markdown, page = output.read_text(), (tmp_path / "page.html").read_text()
    with output.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    means = {line["name"]: line for line in lines if line["item"] == "Mean"}
    binary = means[f"{NAME}-CLB2"]
    assert (binary["I-AUROC"], binary["I-AUROC difference"], binary["compared categories"]) == ("83.0000", "-2.0000", "2")
    assert (binary["categories"], binary["expected"], binary["decoder side bytes"]) == ("2", "15", "513")
    assert (means["INP-Former"]["I-AUROC"], means["INP-Former"]["kind"]) == ("99.7", "published")
    (cable,) = [line for line in lines if line["name"] == f"{NAME}-CLB2" and line["item"] == "cable"]
    assert (cable["I-AUROC"], cable["I-AUROC difference"], cable["AUPRO difference"]) == ("81.0000", "1.0000", "-10.0000")
    assert [line["kind"] for line in lines][-1] == "claim"
    assert "| 83.00 (-2.00) |" in markdown
    assert "<td>83.00 (-2.00)</td>" in page
    for text in (markdown, page):
        assert "nothing is trained yet" in text
        assert "2026-01-02" in text
        assert "c0ffee" in text
        assert "AUPRO: exact up to FPR 0.3" in text
        assert "BinaryAD claims" in text
    assert page.count("<svg") == 4  # I-AUROC and AUPRO against two sizes; nothing is measured in milliseconds


def test_seeds_and_their_runs_are_in_the_csv(tmp_path):
    runs = [
        make_run(tmp_path, {"bottle": row(0.90)}),
        make_run(tmp_path, {"bottle": row(0.96)}, "--seed", "2", "--save_name", "=other"),
    ]
    arguments = ["--csv", str(tmp_path / "table.csv"), "--html", str(tmp_path / "page.html")]
    assert report.main([*map(str, runs), *arguments]) == 0
    lines = [line for line in csv.DictReader((tmp_path / "table.csv").open()) if line["kind"] in ("run", "seeds")]
    means = [(line["kind"], line["name"], line["seeds"], line["I-AUROC"]) for line in lines if line["item"] == "Mean"]
    assert means == [
        ("run", "INP-Former-Single-Class-FP", "1", "90.0000"),
        ("run", "'=other", "2", "96.0000"),
        ("seeds", "INP-Former-Single-Class-FP", "1 2", "93.0000"),
    ]
    assert [line["I-AUROC deviation"] for line in lines if line["kind"] == "seeds"] == ["4.2426", "4.2426"]


def test_command_without_any_result_fails(tmp_path, capsys):
    assert report.main([str(tmp_path / "absent"), "--html", str(tmp_path / "page.html")]) == 2
    assert "no results in" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_tables_are_safe_from_their_content():
    table = Table("a|b", [("item", "x"), ("<b>|*", "1\n2")], ("note",))
    assert "| &lt;b&gt;\\|\\* | 1 2 |" in table.markdown(2)
    assert table.markdown(2).startswith("## a\\|b\n")
    assert "<td>&lt;b&gt;|*</td>" in table.html(2)


def test_published_categories_average_to_the_published_means():
    published, compared = read_published(), 0
    for mean in published.rows:
        same = [row for row in published.of(mean.setting, mean.dataset) if (row.kind, row.method) == (mean.kind, mean.method)]
        if mean.item == "Mean" and not mean.host and len(same) == 1 + len(LAYOUTS[mean.dataset].published_items):
            for name in METRIC_NAMES:
                values = [float(row.metrics[name]) for row in same if row.item != "Mean"]
                assert abs(sum(values) / len(values) - float(mean.metrics[name])) < 0.06  # all have one decimal
                compared += 1
    assert compared == 3 * 7  # Dinomaly, multi-class, on three data sets


PRESETS = {"single": "table_single_class", "multi": "table_multi_class", "few": "table_few_shot"}
# the paper's encoder, sizes, training and evaluation
PAPER = {
    "encoder": "dinov2reg_vit_base_14", "input_size": 448, "crop_size": 392, "INP_num": 6, "total_epochs": 200,
    "batch_size": 16, "learning_rate": 1e-3, "final_learning_rate": 1e-4, "weight_decay": 1e-4, "gradient_clip": 0.1,
    "precision": "fp32", "seed": 1, "warmup_iters": None, "total_iters": None, "max_ratio": 0.01, "smoothing_kernel": 5,
    "smoothing_sigma": 4.0, "mask_threshold": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("setting", PRESETS)
def test_presets_spell_out_the_papers_values_which_are_the_defaults(setting):
    path = REPOSITORY / "configs" / f"{PRESETS[setting]}.yaml"
    parsed = vars(parse(base_parser("", INP_FORMER, [setting]), ["--config", str(path)]))
    assert {key: parsed[key] for key in PAPER} == PAPER
    defaults = vars(parse(base_parser("", INP_FORMER, [setting]), []))
    assert {**parsed, "config": None} == defaults
    assert set(yaml.safe_load(path.read_text())) >= PAPER.keys() - {"total_iters"}
    assert path.read_text().startswith(
        f"# python Binary_INP_{PRESETS[setting].removeprefix('table_').title()}.py --config configs/"
    )


DINOMALY_PRESETS = {"single": "table_dinomaly_single_class", "multi": "table_dinomaly_multi_class"}
# the numbers of the authors' scripts, by setting and data set
DINOMALY_SCRIPTS = {
    ("multi", "MVTec-AD"): {"total_iters": 10_000, "bottleneck_dropout": 0.2, "adam_eps": 1e-10},
    ("multi", "VisA"): {"total_iters": 10_000, "bottleneck_dropout": 0.2, "adam_eps": 1e-10},
    ("multi", "Real-IAD"): {"total_iters": 50_000, "bottleneck_dropout": 0.4, "adam_eps": 1e-10},
    ("single", "MVTec-AD"): {"total_iters": 5_000, "bottleneck_dropout": 0.2, "adam_eps": 1e-8},
    ("single", "VisA"): {"total_iters": 5_000, "bottleneck_dropout": 0.2, "adam_eps": 1e-8},
    ("single", "Real-IAD"): {"total_iters": 5_000, "bottleneck_dropout": 0.2, "adam_eps": 1e-10},
}
DINOMALY_PAPER = {key: value for key, value in PAPER.items() if key != "INP_num"} | {
    "total_epochs": None, "learning_rate": 2e-3, "final_learning_rate": 2e-4, "mining_final": 0.9, "mining_factor": 0.1,
    "mining_warmup": None, "decoder_attention": "linear", "groups": 2, "remove_class_token": False, "recentre": False,
    "sab": "off", "mask_threshold": 0,
}  # fmt: skip


@pytest.mark.parametrize(("setting", "dataset"), DINOMALY_SCRIPTS)
def test_dinomalys_presets_spell_out_its_authors_values_which_are_the_defaults(setting, dataset):
    path = REPOSITORY / "configs" / f"{DINOMALY_PRESETS[setting]}.yaml"
    parser = base_parser("", DINOMALY, ["multi", "single", "few"])
    settings = settings_of(parse(parser, ["--config", str(path), "--dataset", dataset])).config
    expected = {**DINOMALY_PAPER, **DINOMALY_SCRIPTS[setting, dataset], "setting": setting}
    assert {key: settings[key] for key in expected} == expected
    assert settings == settings_of(parse(parser, ["--setting", setting, "--dataset", dataset])).config
    assert set(yaml.safe_load(path.read_text())) >= expected.keys() - {"total_epochs"}
    assert path.read_text().startswith(f"# python Binary_Dinomaly.py --config configs/{path.name}")


def test_the_preset_for_laptops_parses():
    path = REPOSITORY / "configs" / "small_encoder.yaml"
    parsed = parse(base_parser("", INP_FORMER, ["single"]), ["--config", str(path)])
    assert (parsed.encoder, parsed.crop_size, parsed.total_iters) == ("dinov2_vit_small_14", 280, 200)


@pytest.fixture
def table_script(tmp_path):
    """Run a table script with a python that only records its command lines; (exit code, command lines, process)."""
    return table_runner(tmp_path)


def words(text: str) -> list[str]:
    return text.split()


TAIL = "_Encoder=dinov2reg_vit_base_14_Resize=448_Crop=392_INP_num=6"


def test_multi_class_table_gives_the_papers_commands_and_one_report(table_script):
    code, commands, started = table_script("table_multi_class", "--visa", "d/visa")
    start = "Binary_INP_Multi_Class.py --config configs/table_multi_class.yaml --dataset VisA --data_path d/visa --phase train"
    end = "--save_dir runs --resume"
    names = [f"{NAME}{suffix}" for suffix in ("-FP", "", "-CLB2")]
    runs = [f"runs/{name}_dataset={dataset}{TAIL}" for dataset in ("MVTec-AD", "VisA", "Real-IAD") for name in names]
    assert commands == [
        words(f"{start} --clb_stage 0 {end}"),
        words(f"{start} --clb_stage 1 {end}"),
        words(f"{start} --clb_stage 2 --load_checkpoint {NAME} {end}"),
        ["-m", "scripts.report", *runs, *words("--output runs/table_multi_class.md --html runs/table_multi_class.html")],
    ]
    assert code == 0
    assert "MVTec-AD is left out" in started.stdout
    assert "VisA is left out" not in started.stdout


@pytest.mark.parametrize(("setting", "name"), [("multi", "Dinomaly-Multi-Class"), ("single", "Dinomaly-Single-Class")])
def test_dinomalys_tables_give_its_commands_and_find_its_runs(table_script, setting, name):
    table = DINOMALY_PRESETS[setting]
    code, commands, _ = table_script(table, "--realiad", "d/real", SEEDS="1 2", EXTRA="--crop_size 378")
    start = f"Binary_Dinomaly.py --config configs/{table}.yaml --dataset Real-IAD --data_path d/real --phase train"
    end = f"--setting {setting} --save_dir runs --resume --crop_size 378"
    second = [f"--seed 2 --save_name {name}-seed2{suffix} {end}" for suffix in ("-FP", "", "-CLB2")]
    assert commands[:-1] == [
        words(f"{start} --clb_stage 0 {end}"),
        words(f"{start} --clb_stage 1 {end}"),
        words(f"{start} --clb_stage 2 --load_checkpoint {name} {end}"),
        words(f"{start} --clb_stage 0 {second[0]}"),
        words(f"{start} --clb_stage 1 {second[1]}"),
        words(f"{start} --clb_stage 2 --load_checkpoint {name}-seed2 {second[2]}"),
    ]
    parser = base_parser("", DINOMALY, ["multi", "single", "few"])
    trained = [str(settings_of(parse(parser, command[1:])).run_path) for command in commands[:-1]]
    assert set(trained) <= set(commands[-1])
    assert sum("_dataset=Real-IAD_" in word for word in commands[-1]) == len(trained)
    assert code == 0


def test_environment_reaches_the_trainings(table_script):
    environment = {
        "MVTEC_PATH": "data/mvtec", "ITEMS": "bottle cable", "ITERS": "100", "STAGES": "2", "SEEDS": "1 2", "SHOTS": "1 4",
        "ENCODER": "dinov2reg_vit_small_14", "ENCODER_WEIGHTS": "w.pth", "NPROC": "2",
        "EXTRA": "--input_size 64 --crop_size=56 --device cpu",
    }  # fmt: skip
    _, commands, _ = table_script("table_few_shot", **environment)
    launcher = "-m torch.distributed.run --nproc_per_node 2 -- Binary_INP_Few_Shot.py --config configs/table_few_shot.yaml"
    data = "--dataset MVTec-AD --data_path data/mvtec --phase train --clb_stage 2 --load_checkpoint"
    end = (
        "--item bottle cable --total_iters 100 --save_dir runs --encoder dinov2reg_vit_small_14 --encoder_weights w.pth "
        "--resume --input_size 64 --crop_size=56 --device cpu --batch_size 8"
    )
    name = "INP-Former-Few-Shot"
    second = f"{name}-seed2 --seed 2 --save_name {name}-seed2-CLB2"
    assert commands[:-1] == [
        words(f"{launcher} {data} {name} --shot 1 {end}"),
        words(f"{launcher} {data} {name} --shot 4 {end}"),
        words(f"{launcher} {data} {second} --shot 1 {end}"),
        words(f"{launcher} {data} {second} --shot 4 {end}"),
    ]
    tail = "_Encoder=dinov2reg_vit_small_14_Resize=64_Crop=56_INP_num=6"
    assert f"runs/{name}-CLB2-1_dataset=MVTec-AD{tail}" in commands[-1]
    assert f"runs/{name}-seed2-CLB2-4_dataset=Real-IAD{tail}" in commands[-1]


@pytest.mark.parametrize(("extra", "share"), [("", "4"), ("--batch_size 8", "2"), ("--batch_size=24", "6")])
def test_processes_share_the_batch_of_one_process(table_script, extra, share):
    _, commands, _ = table_script("table_single_class", "--mvtec", "data", NPROC="4", STAGES="0", EXTRA=extra)
    parsed = parse(base_parser("", INP_FORMER, ["single"]), commands[0][commands[0].index("--dataset") :])
    assert parsed.batch_size == int(share)
    assert commands[0].count("torch.distributed.run") == 1


@pytest.mark.parametrize(("processes", "extra"), [("3", ""), ("32", ""), ("0", ""), ("x", ""), ("2", "--batch_size 5")])
def test_a_batch_that_processes_cannot_share_is_refused(table_script, processes, extra):
    code, commands, started = table_script("table_multi_class", "--mvtec", "data", NPROC=processes, EXTRA=extra)
    assert (code, commands) == (2, [])
    assert f"NPROC={processes} processes cannot share --batch_size {extra[-1:] or 16} " in started.stderr


def test_a_failed_training_is_reported_and_the_others_go_on(table_script):
    flags = ("table_single_class", "--mvtec", "data")
    code, commands, started = table_script(*flags, codes={"--clb_stage 1": 3})
    assert code == 1
    assert [command[command.index("--clb_stage") + 1] for command in commands[:-1]] == ["0", "1", "2"]
    assert commands[-1][:2] == ["-m", "scripts.report"]
    assert re.search(r"failed with exit code 3: .*--clb_stage 1 ", started.stderr)
    code, again, _ = table_script(*flags)
    assert code == 0
    assert again == commands  # every training goes on by itself: the flags are the same, with --resume
    assert all("--resume" in command for command in again[:-1])


def test_a_stopped_table_ends_at_once_and_a_failed_report_is_a_failure(table_script):
    code, commands, started = table_script("table_single_class", "--mvtec", "data", codes={"--clb_stage 0": 130})
    assert (code, len(commands)) == (130, 1)
    assert "goes on from here" in started.stderr
    assert table_script("table_single_class", "--mvtec", "data", codes={"scripts.report": 2})[0] == 1


@pytest.mark.parametrize("name", [*PRESETS.values(), *DINOMALY_PRESETS.values()])
def test_table_scripts_explain_themselves_and_refuse_what_they_do_not_know(table_script, name):
    code, commands, started = table_script(name, "--help")
    assert (code, commands) == (0, [])
    assert f"bash scripts/{name}.sh [--mvtec FOLDER]" in started.stdout
    assert ("SHOTS" in started.stdout) == (name == "table_few_shot")
    for flags, message in ((["--mvtek", "x"], "--mvtek"), (["--mvtec"], "needs a folder"), ([], "no data set")):
        code, commands, started = table_script(name, *flags)
        assert (code, commands) == (2, [])
        assert message in started.stderr


def test_smoke_iterations_have_a_folder_of_their_own(table_script):
    _, commands, _ = table_script("table_single_class", "--mvtec", "data", SAVE_DIR="", ITERS="7", STAGES="0")
    assert commands[0][commands[0].index("--save_dir") + 1] == "./saved_results/iterations=7"


@pytest.mark.parametrize(
    ("setting", "environment", "script", "name"),
    [
        ("single", {}, "Binary_INP_Single_Class.py", "seed3"),
        ("multi", {}, "Binary_INP_Multi_Class.py", "seed3-multi"),
        ("few", {"HOST": "INP-Former"}, "Binary_INP_Few_Shot.py", "seed3-few"),
        ("single", {"HOST": "Dinomaly"}, "Binary_Dinomaly.py --setting single", "seed3-dinomaly"),
        ("multi", {"HOST": "Dinomaly"}, "Binary_Dinomaly.py --setting multi", "seed3-dinomaly-multi"),
        (
            "few",
            {"HOST": "Dinomaly", "VARIANT": "softmax", "EXTRA": "--decoder_attention softmax", "ITEMS": "a b"},
            "Binary_Dinomaly.py --setting few",
            "seed3-dinomaly-softmax-few",
        ),
    ],
)
def test_results_of_both_hosts_are_trained_alike_and_measured_alike(table_script, setting, environment, script, name):
    stages = "float stage1 stage2 control"
    _, commands, _ = table_script("results_settings", "data", setting, "3", stages, ITERATIONS="50", **environment)
    items = "--item a b " if environment.get("ITEMS") else ""
    extra = environment.get("EXTRA", "")
    start = f"{script} --dataset Folder --data_path data {items}--seed 3 --encoder dinov2_vit_small_14 --input_size 256"
    start += " --crop_size 224 --batch_size 8 --precision bf16 --mask_threshold 0.5 --save_dir runs --save_name"
    assert commands == [
        words(f"{start} {name}-float --clb_stage 0 --total_iters 50 --resume {extra}"),
        words(f"{start} {name}-stage1 --clb_stage 1 --total_iters 50 --resume --load_checkpoint {name}-float {extra}"),
        words(f"{start} {name}-stage2 --clb_stage 2 --total_iters 50 --resume --load_checkpoint {name}-stage1 {extra}"),
        words(f"{start} {name}-float-control --clb_stage 0 --total_iters 150 --resume {extra}"),
    ]
    parser = base_parser("", DINOMALY if "Dinomaly" in script else INP_FORMER, [setting])
    assert {settings_of(parse(parser, command[1:])).evaluation for command in commands} == {EvaluationOptions()}


def test_results_of_an_unknown_host_are_refused(table_script):
    code, commands, started = table_script("results_settings", "data", "multi", "1", HOST="dinomaly")
    assert (code, commands) == (2, [])
    assert "choose INP-Former or Dinomaly" in started.stderr


def test_a_real_table_in_miniature(table_script, tmp_path):
    data, out = make_mvtec(tmp_path / "data"), tmp_path / "runs"
    environment = {
        "PYTHON": sys.executable, "ITEMS": "bottle", "ITERS": "4", "STAGES": "0", "SAVE_DIR": str(out),
        "ENCODER": "random_vit_tiny_14", "OMP_NUM_THREADS": "1",
        "EXTRA": "--input_size 64 --crop_size 56 --batch_size 4 --num_workers 0 --device cpu",
    }  # fmt: skip
    code, _, started = table_script("table_single_class", "--mvtec", str(data), **environment)
    assert code == 0, started.stderr
    lines = [line for line in csv.DictReader((out / "table_single_class.csv").open()) if line["kind"] == "run"]
    assert [(line["stage"], line["item"], line["categories"]) for line in lines] == [
        ("0", "Mean", "1"),
        ("0", "bottle", "1"),
    ]
    page = (out / "table_single_class.html").read_text()
    assert page.count("data:image/jpeg;base64") == 1
    assert (out / "table_single_class.md").read_text().count("nothing is trained yet") == 2
