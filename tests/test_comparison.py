"""Which runs belong together, what is missing, and differences to float, against numbers computed by hand."""

import math
import shutil
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from tests.run_folders import make_run, row
from utils.comparison import compare_runs
from utils.result_files import write_pixel_errors

NAME = "INP-Former-Single-Class"
FLOAT_ROWS = {"bottle": row(0.9, AUPRO=0.6), "cable": row(0.8, AUPRO=0.5), "carpet": row(0.7)}


def only_section(*folders):
    (section,) = compare_runs(folders).sections
    return section


def test_difference_to_float_is_taken_over_the_categories_that_both_have(tmp_path):
    float_run = make_run(tmp_path, FLOAT_ROWS)
    binary = make_run(tmp_path, {"cable": row(0.81, AUPRO=0.4), "bottle": row(0.85), "pill": row(0.1)}, stage=2)
    section = only_section(binary, float_run)
    assert [group.stage for group in section.groups] == [0, 2]
    group = section.groups[1]
    assert group.items == ["bottle", "cable", "pill"]  # the data set's order
    assert group.items_with_float == ["bottle", "cable"]
    assert group.average("I-AUROC", group.items).mean == pytest.approx((0.85 + 0.81 + 0.1) / 3)
    assert group.average("I-AUROC", group.items).deviation is None
    assert group.difference("I-AUROC", group.items_with_float).mean == pytest.approx((-0.05 + 0.01) / 2)
    assert group.difference("AUPRO", group.items_with_float).mean == pytest.approx(-0.1)  # only cable has it in both
    assert group.difference("P-AP", group.items_with_float) is None
    assert section.groups[0].pairs == []


def test_runs_that_differ_in_their_seed_are_averaged_and_compared_seed_by_seed(tmp_path):
    folders = []
    for seed, name, float_value, value in (("2", f"{NAME}-seed2", 0.8, 0.86), ("1", NAME, 0.9, 0.92)):
        flags = ("--seed", seed, "--save_name")
        folders.append(make_run(tmp_path, {"bottle": row(float_value)}, *flags, f"{name}-FP"))
        binary = (*flags, f"{name}-CLB2", "--load_checkpoint", name)
        folders.append(make_run(tmp_path, {"bottle": row(value)}, *binary, stage=2))
    section = only_section(*folders)
    floats, group = section.groups
    assert [part.run.config["seed"] for part in group.parts] == [1, 2]
    average, difference = group.average("I-AUROC", ["bottle"]), group.difference("I-AUROC", ["bottle"])
    assert (average.mean, average.count) == (pytest.approx(0.89), 2)
    assert average.deviation == pytest.approx(0.06 / math.sqrt(2))
    assert difference.mean == pytest.approx((0.02 + 0.06) / 2)
    assert difference.deviation == pytest.approx(0.04 / math.sqrt(2))
    assert floats.average("I-AUROC", ["bottle"]).mean == pytest.approx(0.85)


def test_seeds_with_different_categories_are_averaged_over_those_that_all_have(tmp_path):
    one = make_run(tmp_path, {"bottle": row(0.9), "cable": row(0.2)})
    two = make_run(tmp_path, {"bottle": row(0.7)}, "--seed", "2", "--save_name", "other")
    (group,) = only_section(one, two).groups
    assert group.items == ["bottle"]
    assert group.average("I-AUROC", group.items).mean == pytest.approx(0.8)


@pytest.mark.parametrize("flags", [("--learning_rate", "0.01"), ("--seed", "1"), ("--seed", "2", "--INP_num", "7")])
def test_other_differences_than_the_seed_keep_runs_apart(tmp_path, flags):
    runs = make_run(tmp_path, FLOAT_ROWS), make_run(tmp_path, FLOAT_ROWS, *flags, "--save_name", "other")
    assert [len(group.parts) for group in only_section(*runs).groups] == [1, 1]


@pytest.mark.parametrize(
    "flags",
    [
        ("--seed", "2"),
        ("--input_size", "476", "--crop_size", "420"),
        ("--encoder", "dinov2reg_vit_small_14"),
        ("--mask_threshold", "0"),
        ("--INP_num", "4"),
        ("--skip_bad_images",),
        ("--precision", "bf16"),
        ("--batch_size", "4"),
    ],
)
def test_a_float_run_of_another_kind_is_not_compared_with(tmp_path, flags):
    float_run = make_run(tmp_path, FLOAT_ROWS, *flags)
    groups = only_section(float_run, make_run(tmp_path, FLOAT_ROWS, stage=1)).groups
    assert groups[1].pairs == []


def test_a_float_run_on_another_split_is_not_compared_with(tmp_path):
    flags = ("--dataset", "Real-IAD")
    float_run = make_run(tmp_path, {"audiojack": row(0.9)}, *flags, "--realiad_json", "other")
    assert only_section(float_run, make_run(tmp_path, {"audiojack": row(0.8)}, *flags, stage=1)).groups[1].pairs == []


@pytest.mark.parametrize(
    ("settings", "pairs"), [(("multi",), 0), (("few",), 0), (("few", "--per_category"), 1), (("single",), 1)]
)
def test_one_model_is_compared_with_float_only_if_that_saw_the_same_categories(tmp_path, settings, pairs):
    setting, *flags = settings
    runs = [
        make_run(tmp_path, FLOAT_ROWS, *flags, setting=setting),
        make_run(tmp_path, FLOAT_ROWS, *flags, "--item", "bottle", "cable", setting=setting, stage=1),
        make_run(tmp_path, FLOAT_ROWS, *flags, "--item", "cable", "bottle", "--save_name", "two", setting=setting, stage=2),
    ]
    assert [len(group.pairs) for group in only_section(*runs).groups] == [0, pairs, pairs]
    same = make_run(tmp_path, FLOAT_ROWS, *flags, "--item", "cable", "bottle", "--save_name", "same", setting=setting)
    assert [len(group.pairs) for group in only_section(*runs, same).groups] == [0, 0, 1, 1]


def test_the_batch_of_all_processes_counts_for_pairs_and_means(tmp_path):
    rows = {"bottle": row(0.9)}
    float_run = make_run(tmp_path, rows)  # 16 images in a step
    shared = make_run(tmp_path, rows, "--batch_size", "4", stage=1, processes=4)
    second = make_run(tmp_path, rows, "--seed", "2", "--save_name", "second", stage=1)
    larger = make_run(tmp_path, rows, "--seed", "3", "--save_name", "larger", stage=1, processes=4)
    groups = only_section(float_run, shared, second, larger).groups
    assert [[part.run.folders[0] for part in group.parts] for group in groups] == [[float_run], [shared, second], [larger]]
    assert [len(group.pairs) for group in groups] == [0, 1, 0]


def test_folders_trained_by_another_number_of_processes_are_not_one_run(tmp_path):
    one = make_run(tmp_path / "a", {"cable": row(0.8)})
    two = make_run(tmp_path / "b", {"bottle": row(0.7)}, processes=4)
    (warning,) = compare_runs([one, two]).warnings
    assert "differ in processes;" in warning


def test_a_configuration_older_than_a_flag_has_its_default(tmp_path):
    flags = ("--dataset", "Real-IAD")
    old, new = (make_run(tmp_path, {"audiojack": row(value)}, *flags, stage=stage) for value, stage in ((0.9, 0), (0.8, 1)))
    config = yaml.safe_load((old / "config.yaml").read_text())
    for key in ("realiad_json", "skip_bad_images", "precision", "scoring", "setting", "allow_missing_masks"):
        del config[key]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    assert only_section(old, new).groups[1].difference("I-AUROC", ["audiojack"]).mean == pytest.approx(-0.1)


def test_runs_on_other_encoder_weights_are_neither_compared_nor_averaged(tmp_path):
    runs = [
        make_run(tmp_path, FLOAT_ROWS, weights="other"),
        make_run(tmp_path, FLOAT_ROWS, stage=1),
        make_run(tmp_path, FLOAT_ROWS, "--seed", "2", "--save_name", "second", stage=1, weights="other"),
    ]
    groups = only_section(*runs).groups
    assert [(len(group.parts), group.pairs) for group in groups] == [(1, [])] * 3


def test_of_several_float_runs_the_equally_long_one_is_compared_with(tmp_path):
    long = make_run(tmp_path, {"bottle": row(1.0)}, "--total_iters", "300", "--save_name", "float-control")
    short = make_run(tmp_path, {"bottle": row(0.9)}, "--save_name", "float")
    binary = make_run(tmp_path, {"bottle": row(0.8)}, stage=1)
    group = only_section(long, short, binary).groups[2]
    assert group.pairs[0][1].run.name == "float"


def test_a_test_with_a_forced_gate_is_a_row_of_its_own_and_compared_with_float(tmp_path):
    float_run = make_run(tmp_path, FLOAT_ROWS)
    binary = make_run(tmp_path, {"bottle": row(0.8)}, stage=2)
    gate = make_run(tmp_path, {"bottle": row(0.5)}, stage=2, inside="test_gate=0")
    other_data = make_run(tmp_path, {"bottle": row(0.4)}, stage=2, inside="test_data_path=elsewhere")
    section = only_section(float_run, binary, gate, other_data)
    names = [group.parts[0].run.name for group in section.groups]
    assert names == [f"{NAME}-FP", f"{NAME}-CLB2", f"{NAME}-CLB2/test_gate=0", f"{NAME}-CLB2/test_data_path=elsewhere"]
    assert section.groups[2].difference("I-AUROC", ["bottle"]).mean == pytest.approx(-0.4)
    assert section.groups[2].parts[0].run.cost["whole model"].binary_parameters == 900
    assert section.groups[3].pairs == []


def test_what_is_missing_is_said(tmp_path):
    finished = make_run(tmp_path, {item: row(0.5) for item in ["candle", "capsules"]}, "--dataset", "VisA")
    waiting = make_run(tmp_path, {}, "--save_name", "waiting")
    failed = make_run(tmp_path, {"a": row(0.5)}, "--dataset", "Folder", items=("a", "b"))
    (failed / "failures.csv").write_text("item,reason\nb,no images\n")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "log.txt").write_text("error")
    comparison = compare_runs([finished, waiting, failed, begun, tmp_path / "absent"])
    nothing = [line for line in comparison.missing if "nothing is trained yet" in line]
    assert [line.split(":")[0] for line in nothing] == [str(begun), str(tmp_path / "absent")]
    others = "cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum"
    assert f"{finished} on VisA: 2 of 12 categories, missing {others}" in comparison.missing
    assert any(line.startswith(f"{waiting} on MVTec-AD: no results yet, missing carpet grid") for line in comparison.missing)
    assert f"{failed} on Folder (data): 1 of 2 categories, missing b" in comparison.missing
    assert f"{failed}: b failed: no images" in comparison.missing
    assert len(comparison.missing) == 6
    assert [(section.dataset, section.groups[0].parts[0].rows.keys()) for section in comparison.sections] == [
        ("VisA", {"candle", "capsules"}),
        ("Folder (data)", {"a"}),
    ]


def test_a_data_set_that_is_left_out_is_one_short_line(tmp_path):
    def absent(dataset: str, *names: str) -> list[Path]:
        return [tmp_path / f"{name}_dataset={dataset}_Encoder=e_Resize=448_Crop=392_INP_num=6" for name in names]

    run = make_run(tmp_path, FLOAT_ROWS)
    visa, real, mvtec = absent("VisA", "FP", "one", "two"), absent("Real-IAD", "FP"), absent("MVTec-AD", "one", "two")
    missing = compare_runs([run, *visa, *real, *mvtec]).missing
    assert missing[:-1] == (
        *(f"{folder}: nothing is trained yet" for folder in mvtec),
        "VisA: nothing is trained yet in any of 3 run folders",
        f"Real-IAD: nothing is trained yet in {real[0]}",
    )
    assert "3 of 15 categories" in missing[-1]


def test_nothing_at_all_and_folders_of_other_things_are_errors(tmp_path):
    with pytest.raises(UserError, match="no results in"):
        compare_runs([tmp_path / "absent", make_run(tmp_path, {})])
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "a.png").touch()
    with pytest.raises(UserError, match="photos' is no run folder"):
        compare_runs([make_run(tmp_path, FLOAT_ROWS, "--save_name", "run"), stranger])


def test_categories_from_several_machines_are_one_run(tmp_path):
    one = make_run(tmp_path / "a", {"cable": row(0.8)}, items=["cable"])
    two = make_run(tmp_path / "b", {"bottle": row(0.9), "cable": row(0.8)}, "--item", "bottle", "cable", items=["bottle"])
    comparison = compare_runs([one, two, one])
    (run,) = comparison.runs
    assert run.folders == (one, two)
    (group,) = comparison.sections[0].groups
    assert group.items == ["bottle", "cable"]
    assert group.average("I-AUROC", group.items).mean == pytest.approx(0.85)
    assert comparison.warnings == ()
    assert any("2 of 15" in line for line in comparison.missing)


def test_errors_of_pixel_metrics_are_kept_by_machine_and_by_data_set(tmp_path):
    flags = ("--dataset", "MVTec-AD+VisA", "--data_path", "one", "two")
    folders = []
    for root, item, error in (("a", "MVTec-AD/bottle", 0.001), ("b", "VisA/candle", 0.002)):
        folders.append(make_run(tmp_path / root, {item: row(0.9)}, *flags, items=[item]))
        write_pixel_errors(folders[-1] / "pixel_errors.csv", {item: error})
    sections = compare_runs(folders).sections
    errors = [section.groups[0].pixel_error(section.groups[0].items) for section in sections]
    assert [section.dataset for section in sections] == ["MVTec-AD", "VisA"]
    assert errors == [0.001, 0.002]


def test_machines_that_disagree_are_an_error_that_names_both(tmp_path):
    one = make_run(tmp_path / "a", {"cable": row(0.8)})
    two = make_run(tmp_path / "b", {"cable": row(0.7)})
    with pytest.raises(UserError, match=f"{one} and {two} .*cable"):
        compare_runs([one, two])


def test_the_same_name_with_another_configuration_is_another_run(tmp_path):
    one = make_run(tmp_path / "a", {"cable": row(0.8)})
    two = make_run(tmp_path / "b", {"bottle": row(0.7)}, "--batch_size", "8")
    comparison = compare_runs([one, two])
    assert len(comparison.runs) == 2
    assert comparison.warnings == (
        f"{one} and {two} have the same name but differ in batch_size; they are shown as separate runs",
    )


@pytest.mark.parametrize(
    ("flags", "weights", "reason"), [(("--data_path", "other"), "e", "data_path"), ((), "f", "encoder weights")]
)
def test_runs_of_one_name_on_other_data_or_weights_are_not_joined(tmp_path, flags, weights, reason):
    one = make_run(tmp_path / "a", {"cable": row(0.8)}, "--dataset", "Folder")
    two = make_run(tmp_path / "b", {"bottle": row(0.7)}, "--dataset", "Folder", *flags, weights=weights)
    (warning,) = compare_runs([one, two]).warnings
    assert f"differ in {reason};" in warning


def test_models_of_all_categories_are_not_joined_if_they_saw_other_categories(tmp_path):
    one = make_run(tmp_path / "a", {"cable": row(0.8)}, "--item", "cable", setting="multi")
    two = make_run(tmp_path / "b", {"bottle": row(0.7)}, "--item", "bottle", setting="multi")
    assert len(compare_runs([one, two]).runs) == 2


def test_runs_that_differ_only_in_seed_need_no_warning_about_their_name(tmp_path):
    one = make_run(tmp_path / "a", {"cable": row(0.8)})
    two = make_run(tmp_path / "b", {"cable": row(0.7)}, "--seed", "2")
    comparison = compare_runs([one, two])
    assert comparison.warnings == ()
    assert len(comparison.sections[0].groups[0].parts) == 2


@pytest.mark.parametrize("stage", [0, 1])
def test_different_protocols_are_announced(tmp_path, stage):
    runs = [make_run(tmp_path, FLOAT_ROWS), make_run(tmp_path / "b", FLOAT_ROWS, "--mask_threshold", "0", stage=stage)]
    warning = compare_runs(runs).warnings[-1]
    assert warning.startswith("PROTOCOLS DIFFER")
    assert "mask: > 0.5" in warning
    assert "mask: > 0;" in warning


def test_settings_and_data_sets_have_their_own_tables_in_the_papers_order(tmp_path):
    rows = {"MVTec-AD/bottle": row(0.9), "VisA/candle": row(0.7), "VisA/cashew": row(0.8)}
    joined = ("--dataset", "MVTec-AD+VisA", "--data_path", "one", "two")
    runs = [
        make_run(tmp_path, FLOAT_ROWS, "--shot", "2", setting="few"),
        make_run(tmp_path, FLOAT_ROWS, "--shot", "1", "--per_category", setting="few"),
        make_run(tmp_path, rows, *joined, setting="multi"),
        make_run(tmp_path, FLOAT_ROWS, setting="multi"),
        make_run(tmp_path, FLOAT_ROWS, "--phase", "test", "--test_checkpoint", "model.pth", setting="multi"),
        make_run(tmp_path, FLOAT_ROWS, "--shot", "1", setting="few"),
        make_run(tmp_path, {"bottle": row(0.4)}),
    ]
    sections = compare_runs(runs).sections
    assert [(section.setting, section.dataset) for section in sections] == [
        ("single-class", "MVTec-AD"),
        ("multi-class", "MVTec-AD"),
        ("super-multi-class", "MVTec-AD"),
        ("super-multi-class", "VisA"),
        ("few-shot 1", "MVTec-AD"),
        ("few-shot 2", "MVTec-AD"),
        ("zero-shot", "MVTec-AD"),
        ("few-shot 1 per category", "MVTec-AD"),
    ]
    visa = sections[3].groups[0]
    assert visa.items == ["candle", "cashew"]
    assert len(visa.parts[0].expected) == 12


def test_a_damaged_file_of_a_run_is_named(tmp_path):
    folder = make_run(tmp_path, FLOAT_ROWS)
    (folder / "cost.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        compare_runs([folder])
    shutil.rmtree(folder)
    assert make_run(tmp_path, FLOAT_ROWS) == folder


def test_a_damaged_table_of_one_run_is_missing_and_the_others_are_shown(tmp_path):
    whole = make_run(tmp_path, {"bottle": row(0.5)})
    cut = make_run(tmp_path, {"bottle": row(0.75)}, stage=1)
    path = cut / "results.csv"
    path.write_text(path.read_text()[:-3])
    comparison = compare_runs([whole, cut])
    assert [run.folders for run in comparison.runs if run.rows] == [(whole,)]
    assert any(str(path) in line and "cut short" in line for line in comparison.missing)
