"""Dinomaly through its entry script: settings and stages, their folders and files, and what the script refuses."""

import csv
import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

import Binary_Dinomaly
import Binary_INP_Multi_Class
from common.errors import Interrupted
from tests.conftest import command_line, run_folder
from tests.miniature import make_mvtec
from tests.test_resume import assert_same
from utils import train_phase
from utils.checkpoint import load_checkpoint, save_checkpoint

ITEMS = ("bottle", "nut")
MULTI, SINGLE, FEW, INP = "Dinomaly-Multi-Class", "Dinomaly-Single-Class", "Dinomaly-Few-Shot", "INP-Former-Multi-Class"
ITERATIONS = ("--total_iters", "3", "--quiet")
STAGE_2 = (*ITERATIONS, "--clb_stage", "2", "--load_checkpoint", MULTI)
STAGES = {  # save name: flags of its training
    f"{MULTI}-FP": ("--clb_stage", "0"),
    MULTI: ("--clb_stage", "1", "--load_checkpoint", f"{MULTI}-FP"),
    f"{MULTI}-CLB2": STAGE_2,
}
RUN_FILES = {"config.yaml", "env.json", "log.txt", "metrics.jsonl", "results.csv", "cost.json", "report.html"}


@dataclass(frozen=True)
class Runs:
    """Data of two categories, the multi-class runs of all stages, and one of INP-Former."""

    root: Path

    def call(self, *flags: str, script=Binary_Dinomaly) -> int:
        return script.main(command_line(self.root, self.root / "data", "Folder", *flags))

    def folder(self, save_name: str) -> Path:
        return run_folder(self.root, save_name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("dinomaly"))
    make_mvtec(runs.root / "data", items=ITEMS)
    for flags in STAGES.values():
        assert runs.call(*ITERATIONS, *flags) == 0
    assert runs.call(*ITERATIONS, "--item", "nut", script=Binary_INP_Multi_Class) == 0
    return runs


@pytest.fixture
def refused(runs, capsys):
    """Call the script with flags that it must refuse before it writes anything; returns its one sentence."""

    def call(*flags: str, script=Binary_Dinomaly) -> str:
        before = sorted((runs.root / "runs").rglob("*"))
        capsys.readouterr()
        try:
            code = runs.call("--quiet", *flags, script=script)
        except SystemExit as stop:  # of argparse
            code = stop.code
        printed, errors = capsys.readouterr()
        (sentence,) = errors.splitlines()
        assert (code, printed, sentence.startswith("error: ")) == (2, "", True), (code, printed, sentence)
        assert sorted((runs.root / "runs").rglob("*")) == before
        return sentence

    return call


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def config_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


def check_results(folder: Path, items=ITEMS) -> None:
    table = rows(folder / "results.csv")
    assert [row["item"] for row in table] == [*items, "Mean"]
    for row in table[:-1]:
        judged = rows(folder / row["item"] / "scores.csv")
        assert [line["label"] for line in judged] == ["0"] * 3 + ["1"] * 3
        truth = roc_auc_score([int(line["label"]) for line in judged], [float(line["score"]) for line in judged])
        assert float(row["I-AUROC"]) == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize(("stage", "save_name"), list(enumerate(STAGES)))
def test_multi_class_is_the_default_and_its_stages_follow_each_other(runs, stage, save_name):
    folder = runs.folder(save_name)
    assert folder.name == f"{save_name}_dataset=Folder_Encoder=random_vit_tiny_14_Resize=64_Crop=56"
    assert {path.name for path in folder.iterdir()} == {*RUN_FILES, "model.pth", *ITEMS}
    check_results(folder)
    config = config_of(folder)
    found = [config[key] for key in ("host", "setting", "clb_stage", "decoder_attention", "sab")]
    assert found == ["Dinomaly", "multi", stage, "linear", "off"]
    assert "INP_num" not in config
    content = load_checkpoint(folder / "model.pth")
    assert [content[key] for key in ("host", "stage", "item", "items")] == ["Dinomaly", stage, "multi", list(ITEMS)]
    scales = {name.split(".", 2)[2] for name in content["model"] if name.endswith(".alpha")}
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"][: 2 * stage]
    assert scales == {f"{layer}.alpha" for layer in layers}
    (line,) = [line for line in map(json.loads, (folder / "metrics.jsonl").open()) if line["kind"] == "training"]
    assert (line["iteration"], line["loss"], line.get("coherence")) == (3, line["reconstruction"], None)
    decoder = json.loads((folder / "cost.json").read_text())["decoder side"]
    assert (decoder["binary_parameters"] > 0) == (stage > 0)
    assert "Dinomaly" in (folder / "report.html").read_text()


def test_stage_2_from_a_file_is_that_from_a_name(runs):
    flags = ("--clb_stage", "2", "--load_checkpoint", str(runs.folder(MULTI) / "model.pth"), "--save_name", "dinomaly-file")
    assert runs.call(*ITERATIONS, *flags) == 0
    files = (runs.folder(name) / "model.pth" for name in ("dinomaly-file", f"{MULTI}-CLB2"))
    assert_same(*(load_checkpoint(file)["model"] for file in files))


def test_the_test_phase_repeats_the_numbers_of_the_training(runs):
    folder = runs.folder(f"{MULTI}-CLB2")
    tables = [folder / "results.csv", *(folder / item / "scores.csv" for item in ITEMS)]
    kept = [table.read_bytes() for table in tables]
    for table in tables:
        table.unlink()
    assert runs.call("--phase", "test", "--clb_stage", "2", "--quiet") == 0
    assert [table.read_bytes() for table in tables] == kept


def test_single_class_trains_a_model_for_every_category(runs):
    setting = (*ITERATIONS, "--setting", "single")
    assert runs.call(*setting, "--clb_stage", "1") == 0
    assert runs.call(*setting, "--clb_stage", "2", "--load_checkpoint", SINGLE) == 0
    for stage, save_name in ((1, SINGLE), (2, f"{SINGLE}-CLB2")):
        folder = runs.folder(save_name)
        check_results(folder)
        assert {path.name for path in folder.iterdir()} == {*RUN_FILES, *ITEMS}
        contents = [load_checkpoint(folder / item / "model.pth") for item in ITEMS]
        assert [(content["item"], content["stage"]) for content in contents] == [(item, stage) for item in ITEMS]
        assert not torch.equal(*(content["model"]["bottleneck.0.fc1.weight"] for content in contents))


@pytest.mark.parametrize("per_category", [False, True])
def test_few_shot_trains_one_model_for_all_or_one_for_each(runs, per_category):
    setting = (*ITERATIONS, "--setting", "few", "--shot", "1", *(["--per_category"] if per_category else []))
    name = f"{FEW}-Per-Category" if per_category else FEW
    assert runs.call(*setting, "--clb_stage", "1") == 0
    folder = runs.folder(f"{name}-1")
    check_results(folder)
    models = [folder / item for item in ITEMS] if per_category else [folder]
    assert sorted(path.parent for path in folder.rglob("model.pth")) == models
    chosen = [row["item"] for model in models for row in rows(model / "chosen_files.csv")]
    assert chosen == list(ITEMS)
    stage_2 = (*setting, "--clb_stage", "2", "--load_checkpoint", name)
    assert runs.call(*stage_2, "--item", "nut") == (0 if per_category else 2)  # one of other categories is no start


def test_dropout_and_mining_of_stage_2_are_its_own(runs, monkeypatch):
    trained = []

    def stop_at_once(detector, *_):
        trained.append(detector)
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(train_phase, "fit", stop_at_once)
    options = {"bottleneck_dropout": 0.35, "mining_final": 0.5, "mining_warmup": 2, "mining_factor": 0.3}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert runs.call(*STAGE_2, "--save_name", "dinomaly-other", *flags) == 130
    (detector,) = trained
    assert vars(detector.training_options) == options
    assert [layer.p for layer in detector.modules() if isinstance(layer, torch.nn.Dropout) and layer.p] == [0.35]
    config = config_of(runs.folder("dinomaly-other"))
    assert {name: config[name] for name in options} == options
    assert config_of(runs.folder(MULTI))["bottleneck_dropout"] == 0.2


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--decoder_attention", "softmax"), "decoder_attention: expected 'softmax', found 'linear'"),
        (("--groups", "1"), "groups: expected 1, found 2"),
        (("--remove_class_token",), "remove_class_token: expected True, found False"),
        (("--recentre",), "recentre: expected True, found False"),
    ],
)
def test_another_network_than_the_checkpoints_is_refused(runs, refused, flags, difference):
    for command in (STAGE_2, ("--phase", "test")):
        sentence = refused(*command, *flags, "--save_name", MULTI if "test" in command else "dinomaly-wrong")
        assert f"wrong model: {str(runs.folder(MULTI) / 'model.pth')!r}" in sentence
        assert difference in sentence
        others = {"decoder_attention", "groups", "remove_class_token", "recentre"} - {difference.split(":")[0]}
        assert not [name for name in others if f"{name}: expected" in sentence]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--sab", "mixed"), "--sab mixed binarizes attention maps and linear attention has none"),
        (("--sab", "binary", "--phase", "test"), "give --decoder_attention softmax"),
        (("--phase", "test", "--force_gate", "0"), "--force_gate is for --phase test of a model with gates"),
        (("--INP_num", "6"), "unknown flag '--INP_num'"),
        (("--clb_stage", "2"), f"--load_checkpoint NAME (its save_name, by default {MULTI})"),
        (("--phase", "test", "--scoring", "prototype"), "prototype"),
    ],
)
def test_flags_that_cannot_work(refused, flags, said):
    assert said in refused(*flags)


@pytest.mark.parametrize(
    ("script", "other"), [(Binary_Dinomaly, INP), (Binary_INP_Multi_Class, MULTI)], ids=["INP for Dinomaly", "the reverse"]
)
def test_runs_of_the_other_host_are_refused(runs, refused, script, other):
    folder = runs.folder(other)
    hosts = ("Dinomaly", "INP-Former") if script is Binary_Dinomaly else ("INP-Former", "Dinomaly")
    sentence = refused("--config", str(folder / "config.yaml"), script=script)
    assert "config.yaml' is of a run on '{1}', this script trains {0};".format(*hosts) in sentence
    stage_2 = (*ITERATIONS, "--clb_stage", "2", "--save_name", "other-host", "--load_checkpoint")
    sentence = refused(*stage_2, str(folder / "model.pth"), script=script)
    assert "model.pth' is a model of {1}, this script is for {0};".format(*hosts) in sentence


def test_an_inp_run_from_before_there_were_two_hosts_is_tested_and_goes_on(runs):
    """Its files name no host in the configuration and no epsilon."""
    folder = runs.folder(INP)
    kept = (folder / "results.csv").read_bytes()
    config, content = config_of(folder), load_checkpoint(folder / "model.pth")
    for stored in (config, content["config"]):
        del stored["host"], stored["adam_eps"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    save_checkpoint(folder / "model.pth", {name: value for name, value in content.items() if name != "model_sha256"})
    for flags in (("--item", "nut"), ("--config", str(folder / "config.yaml"))):
        (folder / "results.csv").unlink()
        assert runs.call("--phase", "test", "--quiet", *flags, script=Binary_INP_Multi_Class) == 0
        assert (folder / "results.csv").read_bytes() == kept
    stage_2 = ("--clb_stage", "2", "--load_checkpoint", INP, "--item", "nut")
    assert runs.call(*ITERATIONS, *stage_2, script=Binary_INP_Multi_Class) == 0
