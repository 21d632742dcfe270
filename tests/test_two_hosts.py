"""INP-Former and Dinomaly in one report: never paired, joined or timed as one, and told apart by every reader."""

import csv
import json

import pytest
import yaml

from common.errors import UserError
from scripts import report
from tests.run_folders import make_run, row
from utils import run_timing
from utils.comparison import compare_runs
from utils.comparison_notes import result_notes
from utils.comparison_tables import provenance_table
from utils.hosts import DINOMALY, INP_FORMER
from utils.published import MEAN, read_published

ROWS = {"bottle": row(0.9), "cable": row(0.8)}
SOFTMAX = ("--decoder_attention", "softmax")
EQUAL_SIZES = ("--mask_threshold", "0.5", "--learning_rate", "0.001")  # all that the hosts' defaults differ in


def groups_of(*folders):
    (section,) = compare_runs(folders).sections
    return section.groups


def dinomaly(root, *flags, rows=ROWS, **further):
    return make_run(root, rows, *flags, host=DINOMALY, **further)


@pytest.mark.parametrize("setting", ["single", "multi", "few"])
@pytest.mark.parametrize(("float_host", "host"), [(INP_FORMER, DINOMALY), (DINOMALY, INP_FORMER)])
def test_a_binary_run_is_not_compared_with_the_other_hosts_float_run(tmp_path, float_host, host, setting):
    def run(of, stage, value):
        return make_run(tmp_path, {"bottle": row(value)}, *EQUAL_SIZES, host=of, stage=stage, setting=setting)

    other, binary = run(float_host, 0, 0.5), run(host, 1, 0.8)
    assert [group.pairs for group in groups_of(other, binary)] == [[], []]
    own = run(host, 0, 0.9)
    (group,) = [group for group in groups_of(other, binary, own) if group.stage == 1]
    assert [part.run.folders for part in group.pairs[0]] == [(binary,), (own,)]
    assert group.difference("I-AUROC", ["bottle"]).mean == pytest.approx(-0.1)


@pytest.mark.parametrize("flags", [SOFTMAX, ("--groups", "1"), ("--remove_class_token",), ("--recentre",)])
def test_another_network_of_the_same_host_is_neither_compared_with_nor_averaged(tmp_path, flags):
    usual, changed = dinomaly(tmp_path), dinomaly(tmp_path, *flags, "--save_name", "changed")
    binary = dinomaly(tmp_path, *flags, stage=2)
    second = dinomaly(tmp_path, *flags, "--seed", "2", "--save_name", "second")
    assert groups_of(usual, binary)[1].pairs == []
    groups = groups_of(usual, changed, binary, second)
    assert [[part.run.folders[0] for part in group.parts] for group in groups] == [[usual], [changed, second], [binary]]
    assert groups[2].pairs[0][1].run.folders[0] == changed


@pytest.mark.parametrize(
    "flags",
    [
        ("--bottleneck_dropout", "0.5"),
        ("--mining_final", "1"),
        ("--mining_warmup", "1"),
        ("--mining_factor", "1"),
        ("--adam_eps", "1"),
    ],
)
def test_runs_that_were_trained_otherwise_are_not_averaged(tmp_path, flags):
    runs = dinomaly(tmp_path), dinomaly(tmp_path, *flags, "--seed", "2", "--save_name", "other")
    assert [len(group.parts) for group in groups_of(*runs)] == [1, 1]


def test_seeds_of_one_network_are_averaged_for_each_host(tmp_path):
    folders = [
        make_run(tmp_path, {"bottle": row(value)}, "--seed", seed, "--save_name", f"seed{seed}-{host.name}", host=host)
        for host, values in ((DINOMALY, (0.7, 0.9)), (INP_FORMER, (0.6, 0.8)))
        for seed, value in zip("12", values, strict=True)
    ]
    groups = groups_of(*folders)
    assert [group.name for group in groups] == ["INP-Former", "Dinomaly"]
    assert [group.average("I-AUROC", ["bottle"]).mean for group in groups] == pytest.approx([0.7, 0.8])


def test_of_several_float_runs_that_with_the_same_dropout_is_compared_with(tmp_path):
    dropout = ("--bottleneck_dropout", "0.4")
    usual = dinomaly(tmp_path, "--save_name", "usual")
    binary = dinomaly(tmp_path, *dropout, stage=1)
    assert groups_of(usual, binary)[1].pairs[0][1].run.name == "usual"
    noisy = dinomaly(tmp_path, *dropout, "--save_name", "noisy")
    longer = dinomaly(tmp_path, *dropout, "--total_iters", "300", "--save_name", "longer")
    assert groups_of(longer, usual, noisy, binary)[3].pairs[0][1].run.name == "noisy"
    assert groups_of(longer, usual, binary)[2].pairs[0][1].run.name == "usual"  # its length counts more


def test_rows_of_two_hosts_stand_apart_and_say_which_they_are(tmp_path, capsys):
    names = {"seed1-multi-float": (INP_FORMER, 0), "seed1-multi-stage1": (INP_FORMER, 1), "seed1-Dinomaly-float": (DINOMALY, 0)}
    runs = [
        make_run(tmp_path, ROWS, "--save_name", name, *EQUAL_SIZES, host=host, stage=stage, setting="multi")
        for name, (host, stage) in reversed(names.items())
    ]
    (alone,) = compare_runs(runs[1:]).sections
    assert [label for label, _ in alone.labelled_groups] == ["seed1-multi-float", "seed1-multi-stage1"]
    labels = ["seed1-multi-float (INP-Former)", "seed1-multi-stage1 (INP-Former)", "seed1-Dinomaly-float"]
    output, page = tmp_path / "table.md", tmp_path / "page.html"
    assert report.main([*map(str, runs), "--output", str(output), "--html", str(page)]) == 0
    assert all(label in output.read_text() and f"<td>{label}</td>" in page.read_text() for label in labels)
    printed = capsys.readouterr().out
    assert printed.index(labels[0]) < printed.index(labels[1]) < printed.index(labels[2])
    assert [page.read_text().count(f">{label} (2 of 15†)</text>") for label in labels] == [2, 2, 2]  # I-AUROC by two sizes
    networks = {line["name"]: line["network"] for line in csv.DictReader(output.with_suffix(".csv").open()) if line["stage"]}
    assert networks == {name: host.name for name, (host, _) in names.items()}


def test_the_network_of_every_run_is_named_with_what_is_unusual_of_it(tmp_path):
    runs = [
        dinomaly(tmp_path, *SOFTMAX, "--groups", "1", "--bottleneck_dropout", "0.3"),
        dinomaly(tmp_path, "--dataset", "Real-IAD", rows={"audiojack": row(0.5)}),
        make_run(tmp_path, ROWS, "--INP_num", "4"),
    ]
    header, *lines = provenance_table(compare_runs(runs).runs).rows
    assert [line[header.index("network")] for line in lines] == [
        "Dinomaly, decoder_attention softmax, groups 1",
        "Dinomaly",
        "INP-Former, INP_num 4",
    ]


def mask_notes(*folders) -> list[str]:
    (section,) = compare_runs(folders).sections
    return [note for note in result_notes(section, []) if "mask >" in note]


def test_other_rules_for_masks_are_said_below_the_table(tmp_path):
    inp, host_rule = make_run(tmp_path, ROWS), dinomaly(tmp_path)
    same_rule = dinomaly(tmp_path, "--mask_threshold", "0.5", "--save_name", "Dinomaly-same")
    assert mask_notes(inp, same_rule) == []
    assert mask_notes(inp, host_rule, same_rule) == [
        "Pixel metrics are not comparable between rows that count other pixels as defect: mask > 0: Dinomaly-Single-Class-FP; "
        "mask > 0.5: INP-Former-Single-Class-FP, Dinomaly-same."
    ]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("multi", "INP-Former: P-AP and P-F1 of masks > 0; Dinomaly: pixel metrics of masks > 0, AUPRO of 200 thresholds"),
        ("few", "INP-Former: P-AP and P-F1 of masks > 0."),
    ],
)
def test_how_published_rows_were_measured_is_said_for_the_methods_that_are_there(tmp_path, setting, said):
    (section,) = compare_runs([dinomaly(tmp_path, setting=setting)]).sections
    others = [published for published in read_published().of(section.setting, section.dataset) if published.item == MEAN]
    (note,) = [note for note in result_notes(section, others) if note.startswith("Published: ")]
    assert said in note
    assert ("Dinomaly" in note) == (setting == "multi")


def test_a_configuration_from_before_there_were_two_hosts_is_of_inp_former(tmp_path):
    old, new = make_run(tmp_path, ROWS), make_run(tmp_path, ROWS, "--seed", "2", "--save_name", "second")
    config = yaml.safe_load((old / "config.yaml").read_text())
    for key in ("host", "adam_eps"):
        del config[key]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    (group,) = groups_of(old, new)
    assert (group.host, len(group.parts)) == ("INP-Former", 2)


def test_a_run_of_an_unknown_host_is_refused(tmp_path):
    folder = make_run(tmp_path, ROWS)
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("host: INP-Former", "host: UniAD"))
    with pytest.raises(UserError, match=f"{folder}/config.yaml' is of a run of 'UniAD'; known hosts are INP-Former Dinomaly"):
        compare_runs([folder])


def test_networks_of_two_hosts_and_of_two_attentions_are_timed_apart(tmp_path, monkeypatch):
    runs = {
        "INP": make_run(tmp_path, ROWS, "--sab", "off", stage=1),
        "linear": dinomaly(tmp_path, stage=1),
        "linear again": dinomaly(tmp_path, "--seed", "2", "--bottleneck_dropout", "0.4", "--save_name", "again", stage=1),
        "softmax": dinomaly(tmp_path, *SOFTMAX, "--sab", "off", "--save_name", "softmax", stage=1),
    }
    for folder in runs.values():
        (folder / "model.pth").touch()
    monkeypatch.setattr(run_timing, "_photo_to_map", lambda path, weights: path)
    monkeypatch.setattr(
        run_timing, "interleaved_medians", lambda calls, repeats: {name: place for place, name in enumerate(calls, 1)}
    )
    run_timing.measure_runs(list(runs.values()), None, 1)
    timings = {name: json.loads((folder / "timing.json").read_text()) for name, folder in runs.items()}
    assert {name: timing["milliseconds"] for name, timing in timings.items()} == {
        "INP": 1000,
        "linear": 2000,
        "linear again": 2000,
        "softmax": 3000,
    }
    assert timings["softmax"]["model"] == str(runs["softmax"] / "model.pth")
