"""The command line: the paper's flags and defaults, configuration files, iterations."""

from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from utils.arguments import base_parser, parse
from utils.hosts import INP_FORMER, VARAD
from utils.protocol import EvaluationOptions
from utils.settings import Settings, changed_protocol, settings_of

NAME = "INP-Former-Single-Class"


def settings(*flags: str, setting: str = "single") -> Settings:
    return settings_of(parse(base_parser("", INP_FORMER, [setting]), flags))


def test_defaults_are_the_papers():
    made = settings("--dataset", "MVTec-AD", "--data_path", "./datasets/mvtec", "--phase", "train", "--clb_stage", "1")
    assert (made.model.encoder, made.config["INP_num"]) == ("dinov2reg_vit_base_14", 6)
    assert (made.data.input_size, made.data.crop_size) == (448, 392)
    assert (made.evaluation.mask_threshold, made.evaluation.max_ratio) == (0.5, 0.01)
    assert (made.evaluation.smoothing_kernel, made.evaluation.smoothing_sigma) == (5, 4.0)
    options = made.training_for("bottle", 209)
    assert (options.batch_size, options.total_iterations, options.warmup) == (16, 2600, 100)
    assert (options.peak_rate, options.final_rate, options.weight_decay) == (1e-3, 1e-4, 1e-4)
    assert (options.gradient_clip, options.seed, options.precision) == (0.1, 1, "fp32")
    folder = f"{NAME}_dataset=MVTec-AD_Encoder=dinov2reg_vit_base_14_Resize=448_Crop=392_INP_num=6"
    assert made.run_path == Path("./saved_results") / folder
    assert made.run_path_of("other").name == folder.replace(NAME, "other")


@pytest.mark.parametrize(("stage", "name"), [("0", f"{NAME}-FP"), ("1", NAME), ("2", f"{NAME}-CLB2")])
def test_every_stage_has_its_own_default_name(stage, name):
    assert settings("--clb_stage", stage, *(["--load_checkpoint", NAME] if stage == "2" else [])).config["save_name"] == name


def test_iterations_or_epochs():
    assert settings("--total_iters", "60").training_for("a", 20).total_iterations == 60
    assert settings("--total_iters", "60").training_for("a", 20).warmup == 12
    assert settings("--total_epochs", "7").training_for("a", 50).total_iterations == 21
    assert settings("--total_iters", "60", "--warmup_iters", "5").training_for("a", 20).warmup == 5
    with pytest.raises(UserError, match="--batch_size 15 or smaller"):
        settings("--total_iters", "60").training_for("a", 15)


def test_config_file_gives_defaults_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"item": ["a", "b"], "total_iters": 9, "seed": 4, "resume": True, "save_name": None}))
    made = settings("--seed", "5", "--config", str(path))
    assert (made.data.items, made.config["total_iters"], made.config["seed"], made.resume) == (["a", "b"], 9, 5, True)
    assert settings("--config", str(path), "--item", "c").data.items == ["c"]


def test_stored_configuration_repeats_a_command(tmp_path):
    flags = ["--clb_stage", "0", "--item", "x", "--learning_rate", "0.002", "--skip_bad_images", "--save_name", "odd name"]
    first = settings(*flags)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(first.config))
    assert settings("--config", str(path)).config == first.config


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch_size", "0"),
        ("--max_ratio", "1.5"),
        ("--clb_stage", "3"),
        ("--unknown", "1"),
        ("--dataset", "MVTec"),
        ("--total_iters", "-1"),
    ],
)
def test_impossible_values_end_with_code_2(flags):
    with pytest.raises(SystemExit) as stop:
        settings(*flags)
    assert stop.value.code == 2


def test_the_order_of_directions_and_hierarchies_means_nothing(capsys):
    parser = base_parser("", VARAD, ["single"])
    given = settings_of(parse(parser, ["--directions", "reversed_row", "row", "--hierarchies", "3", "1"]))
    assert (given.config["directions"], given.config["hierarchies"]) == (["row", "reversed_row"], [1, 3])
    with pytest.raises(SystemExit, match="2"):
        parse(parser, ["--directions", "row", "column", "row"])
    assert "argument --directions: one is named twice" in capsys.readouterr().err


def test_few_images_are_all_trained_on():
    with pytest.raises(UserError, match="--holdout keeps images from the training and few-shot has none to spare"):
        settings("--setting", "few", "--holdout", "0.1", setting="few")


def test_even_smoothing_kernel():
    with pytest.raises(UserError, match="use 5, or 0 for none"):
        settings("--smoothing_kernel", "4")


@pytest.mark.parametrize("size", [1, 15])
def test_a_metric_size_too_small_for_a_map(size):
    with pytest.raises(UserError, match=f"--metric_size {size} is less than 16 and not 0"):
        settings("--metric_size", str(size))


def test_varads_protocol_by_flags():
    flags = ("--metric_size", "0", "--smoothing_border", "reflect", "--smoothing_kernel", "33", "--max_ratio", "0")
    made = settings(*flags, "--interpolation", "bicubic", "--mask_threshold", "0")
    assert made.evaluation == EvaluationOptions(
        mask_threshold=0.0, smoothing_kernel=33, max_ratio=0.0, metric_size=0, smoothing_border="reflect"
    )
    assert (made.data.interpolation, made.identity["interpolation"]) == ("bicubic", "bicubic")


def test_a_run_from_before_there_was_a_choice_of_size_and_border_was_measured_with_the_defaults():
    stored = {key: value for key, value in settings().config.items() if key not in ("metric_size", "smoothing_border")}
    assert changed_protocol(stored, settings()) == []
    changed = settings("--metric_size", "0", "--smoothing_border", "reflect")
    assert changed_protocol(stored, changed) == ["metric_size=0", "smoothing_border=reflect"]


SIZES = "_Encoder=dinov2reg_vit_base_14_Resize=448_Crop=392_INP_num=6"


@pytest.mark.parametrize(
    ("setting", "flags", "folder"),
    [
        ("multi", ("--dataset", "VisA"), f"INP-Former-Multi-Class_dataset=VisA{SIZES}"),
        ("multi", ("--dataset", "VisA", "--clb_stage", "0"), f"INP-Former-Multi-Class-FP_dataset=VisA{SIZES}"),
        ("multi", ("--dataset", "MVTec-AD+VisA", "--data_path", "a", "b"), f"INP-Former-Super-Multi-Class{SIZES}"),
        ("few", ("--shot", "2"), f"INP-Former-Few-Shot-2_dataset=MVTec-AD{SIZES}"),
        ("few", (), f"INP-Former-Few-Shot-4_dataset=MVTec-AD{SIZES}"),
        ("few", ("--per_category",), f"INP-Former-Few-Shot-Per-Category-4_dataset=MVTec-AD{SIZES}"),
    ],
)
def test_run_folders_of_the_settings_have_the_papers_names(setting, flags, folder):
    assert settings(*flags, setting=setting).run_path.name == folder


def test_zero_shot_folder_names_source_and_target():
    flags = ("--phase", "test", "--test_checkpoint", "model.pth", "--scoring", "prototype")
    assert settings(*flags, setting="multi").zero_shot_path("VisA").name == (
        f"INP-Former-Zero-Shot{SIZES}_Source=VisA_Target=MVTec-AD"
    )


def test_one_model_unless_there_is_one_per_category():
    made = [settings(), settings(setting="multi"), settings(setting="few"), settings("--per_category", setting="few")]
    assert [each.one_model for each in made] == [False, True, True, False]
    assert [each.data.shot for each in made] == [None, None, 4, 4]


def test_configuration_of_another_setting_is_refused(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(setting="multi").config))
    assert settings("--config", str(path), setting="multi").config["setting"] == "multi"
    with pytest.raises(SystemExit):
        settings("--config", str(path), setting="single")
    assert "invalid choice: 'multi'" in capsys.readouterr().err


def test_misspelt_data_set_offers_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        settings("--dataset", "VisA+MVTec-DA")
    assert stop.value.code == 2
    assert "did you mean 'MVTec-AD'?" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--dataset", "MVTecAD"), ("--metrics_memory", "0"), ("--shot", "4")])
def test_what_the_parser_refuses_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        settings(*flags)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("see --help")


def test_wrong_type_in_a_configuration_names_the_file(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("total_iters: abc\n")
    with pytest.raises(SystemExit):
        settings("--config", str(path))
    assert "mine.yaml" in capsys.readouterr().err
