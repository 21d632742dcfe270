"""Tampered files of run folders, and names that would be more than names: every command that reads or writes them."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.data_readers import CHECK, TRAININGS, one_with_all
from tests.entry_scripts import INP_FEW, INP_SINGLE, VARAD, EntryScript
from tests.miniature import make_mvtec
from tests.run_folders import make_run, row
from utils.metrics import METRIC_NAMES

COLUMNS = ",".join(("item", *METRIC_NAMES))
DEEP = b"[" * 100_000
COUNTS = {"parameters": 9, "binary_parameters": 0, "added_parameters": 0, "float_macs": 9, "binary_macs": 0, "saved_bits": 0}


def cost(**changed: object) -> bytes:
    return json.dumps({"decoder side": COUNTS, "whole model": {**COUNTS, **changed}}).encode()


# (file of a run folder, its content, words of the sentence about it)
TAMPERED = [
    ("config.yaml", b"", "is empty"),
    ("config.yaml", b"- clb_stage", "is no list of `name: value` lines"),
    ("config.yaml", b"clb_stage: [1", "cannot be read as YAML"),
    ("config.yaml", b"clb_stage: " + DEEP, "nested too deeply"),
    ("config.yaml", b"clb_stage: \xff", "is no UTF-8 text"),
    ("config.yaml", b"clb_stage: two", "has clb_stage 'two'"),
    ("config.yaml", b"crop_size:", "has crop_size None"),
    ("config.yaml", b"encoder: [a]", "has encoder ['a']"),
    ("config.yaml", b"host: [RAAD]", "is of a run of ['RAAD']"),
    ("config.yaml", b"item: bottle\nitem: cable", "'item' is there twice"),
    ("env.json", b"", "is empty"),
    ("env.json", b"[1]", "must hold an object"),
    ("env.json", b'{"items": ["bottle"', "is no JSON"),
    ("env.json", b'{"seed": NaN}', "NaN is no number"),
    ("env.json", DEEP, "nested too deeply"),
    ("env.json", b'{"items": "bottle"}', "items should be a list"),
    ("env.json", b'{"items": [["bottle"]]}', "items[0] should be text, found ['bottle']"),
    ("env.json", b'{"processes": true}', "processes should be an integer"),
    ("env.json", b'{"seed": 1, "seed": 2}', "'seed' is there twice"),
    ("cost.json", b"{}", "has no usable 'decoder side'"),
    ("cost.json", b'{"decoder side": 7}', "['decoder side'] should be a mapping from names, found 7"),
    ("cost.json", cost(parameters="9"), "parameters should be an integer"),
    ("cost.json", cost(parameters=0), "has no usable 'whole model'"),
    ("cost.json", cost(parameters=10**400), "parameters should be an integer"),
    ("cost.json", cost(float_macs=0), "has no usable 'whole model'"),
    ("cost.json", cost(weight=1), '.weight" is unknown'),
    ("timing.json", b"{}", "'milliseconds', 'engine'"),
    ("timing.json", b'{"milliseconds": 1e999}', "is no finite number"),
    ("timing.json", b'{"milliseconds": 1, "engine": "e", "date": "d", "machine": "m"}', "machine should be a list"),
    ("results.csv", b"", "is empty"),
    ("results.csv", b"a,b\n", "has unknown columns"),
    ("results.csv", f"{COLUMNS}\nbottle,0.5000".encode(), "is cut short in line 2"),
    ("results.csv", f"{COLUMNS}\nbottle,0.5000,0.\n".encode(), "has 3 of 8 cells"),
    ("results.csv", f"{COLUMNS}\nbottle,nan,,,,,,\n".encode(), "has 'nan' where a fraction with 4 decimals should be"),
    ("results.csv", f"{COLUMNS}\n../../secret,,,,,,,\n".encode(), "has '../../secret' where a category should be"),
    ("results.csv", f"{COLUMNS}\nbottle,,,,,,,\nbottle,,,,,,,\n".encode(), "has 'bottle' a second time"),
    ("results.csv", f'{COLUMNS}\n"bottle,,,,,,,\n'.encode(), "is no csv"),
    ("failures.csv", b"item\nbottle\n", "has unknown columns"),
    ("failures.csv", b"item,reason\nbottle\n", "has 1 of 2 cells"),
    ("failures.csv", b"item,reason\n" + b"x" * 200_000 + b",y\n", "is no csv"),
    ("pixel_errors.csv", b"item,error\nbottle,many\n", "has the error 'many'"),
    ("pixel_errors.csv", b"item,error\nbottle,inf\n", "has the error 'inf'"),
    ("pixel_errors.csv", b"item,error\nbottle,0.1", "is cut short"),
]


def test_a_report_names_every_tampered_file_and_shows_the_other_runs(commands, tmp_path):  # case 43
    folders = [make_run(tmp_path, {"bottle": row(0.5)}, "--save_name", "whole")]
    for number, (name, content, _) in enumerate(TAMPERED):
        folders.append(make_run(tmp_path, {"bottle": row(0.75)}, "--save_name", f"tampered-{number}"))
        (folders[-1] / name).write_bytes(content)
    finished = commands.run("scripts.report", *folders, "--html", tmp_path / "report.html")
    assert finished.code == 0, finished.err
    lines = [line for line in finished.out.splitlines() if line.startswith("missing: ")]
    for folder, (name, _, words) in zip(folders[1:], TAMPERED, strict=True):
        (line,) = (line for line in lines if repr(str(folder / name)) in line)
        assert words in line
        assert len(line) < 1000
    assert "50.00" in finished.out
    assert "75.00" not in finished.out
    assert "tampered" not in (tmp_path / "report.html").read_text().partition("Our runs")[2]


@pytest.mark.parametrize(("name", "content", "words"), [TAMPERED[index] for index in (3, 14, 31)])
def test_a_report_of_a_tampered_run_alone_is_refused(commands, tmp_path, name, content, words):  # case 43
    folder = make_run(tmp_path, {"bottle": row(0.5)})
    (folder / name).write_bytes(content)
    finished = commands.run("scripts.report", folder, "--html", tmp_path / "report.html")
    assert finished.code == 2
    assert words in finished.sentence
    assert repr(str(folder / name)) in finished.sentence
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"size": []}', b'{"size": {"effective_all": "9"}}', DEEP])
def test_a_tampered_record_of_bits_is_named(commands, tmp_path, content):  # case 43
    folder = make_run(tmp_path, {"bottle": row(0.5)})
    (folder / "bottle").mkdir()
    (folder / "bottle" / "quantization.json").write_bytes(content)
    finished = commands.run("scripts.report", folder, "--html", tmp_path / "report.html")
    assert finished.code == 2
    assert repr(str(folder / "bottle" / "quantization.json")) in finished.sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"path,item,label\n", "has unknown columns"),
        (b"path,item,label,score\na,bottle,2,0.5\n", "has the label '2'"),
        (b"path,item,label,score\na,bottle,1,nan\n", "has the score 'nan'"),
        (b"path,item,label,score\na,bottle,1,0.5\nb,bott", "is cut short in line 3"),
    ],
)
def test_a_page_says_which_scores_are_damaged(commands, tmp_path, content, words):  # case 43
    folder = make_run(tmp_path, {"bottle": row(0.5)})
    (folder / "bottle").mkdir()
    (folder / "bottle" / "scores.csv").write_bytes(content)
    (folder / "metrics.jsonl").write_bytes(b'{"item": "bottle", "kind": "training"}\n\xff\n[1]\n{"item": "bott')
    finished = commands.run("scripts.report", folder, "--html", tmp_path / "report.html")
    assert finished.code == 0, finished.err
    assert finished.err.count("which is damaged") == 4
    for text in (finished.err, (tmp_path / "report.html").read_text()):
        assert "scores damaged: " in text
        assert words.partition("'")[0] in text


@pytest.fixture(scope="session")
def finished_runs(commands, tmp_path_factory) -> Path:
    """A folder with data of two categories and the run of each of two scripts on them."""
    root = tmp_path_factory.mktemp("finished")
    make_mvtec(root / "data", items=("bottle", "test_nut"), train=5)
    for script in (INP_SINGLE, VARAD):
        finished = commands.run(*script.words(root, root / "data"))
        assert finished.code == 0, finished.err
    return root


def copied(finished_runs: Path, script: EntryScript, tmp_path: Path) -> Path:
    """The run folder of a script, copied below tmp_path."""
    shutil.copytree(script.folder(finished_runs), script.folder(tmp_path))
    return script.folder(tmp_path)


@pytest.mark.parametrize("phase", [("--resume",), ("--phase", "test"), ("--overwrite",)], ids=lambda flags: flags[-1])
@pytest.mark.parametrize(
    ("script", "name", "content"),
    [
        (INP_SINGLE, "config.yaml", b"clb_stage: two\n"),
        (VARAD, "config.yaml", b"host: [VarAD]\n"),
        (INP_SINGLE, "env.json", b'{"items": 7}'),
        (INP_SINGLE, "results.csv", f"{COLUMNS}\nbottle,0.5000,".encode()),
        (VARAD, "results.csv", f"{COLUMNS}\nbottle,9.5000,,,,,,\n".encode()),
        (INP_SINGLE, "failures.csv", b"item\n"),
        (INP_SINGLE, "pixel_errors.csv", b"item,error\nbottle,many\n"),
    ],
)
def test_a_tampered_run_folder_is_refused_and_its_models_stay(  # case 43
    commands, finished_runs, tmp_path, script, name, content, phase
):
    folder = copied(finished_runs, script, tmp_path)
    (folder / name).write_bytes(content)
    models = {path: path.read_bytes() for path in folder.rglob("model.pth")}
    finished = commands.run(*script.words(tmp_path, finished_runs / "data", *phase))
    assert "Traceback" not in finished.err
    if (name, phase) != ("pixel_errors.csv", ("--resume",)):  # which has nothing to do and does not read it
        assert finished.code == 2, finished.err
        assert repr(str(folder / name)) in finished.err
    assert {path: path.read_bytes() for path in models} == models


def test_a_line_that_a_crash_cut_short_costs_no_other_line(commands, finished_runs, tmp_path):  # case 43
    folder = copied(finished_runs, INP_SINGLE, tmp_path)
    log, table = folder / "metrics.jsonl", folder / "results.csv"
    before = log.read_text().splitlines()
    log.write_text("\n".join([*before, '{"item": "bot']))
    whole = table.read_bytes()
    table.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    finished = commands.run(*INP_SINGLE.words(tmp_path, finished_runs / "data", "--resume"))
    assert finished.code == 0, finished.err
    assert f"passed over line {len(before) + 1} of {str(log)!r}" in finished.err
    assert table.read_bytes() == whole
    lines = log.read_text().splitlines()
    assert lines[: len(before) + 1] == [*before, '{"item": "bot']
    assert [json.loads(line)["item"] for line in lines[len(before) + 1 :]] == ["test_nut"]


@pytest.mark.parametrize("script", [INP_SINGLE, VARAD], ids=lambda script: script.name)
def test_a_category_that_is_named_like_a_test_keeps_its_model(commands, finished_runs, tmp_path, script):
    folder = copied(finished_runs, script, tmp_path)
    kept = {path: path.read_bytes() for path in (folder / "test_nut").rglob("*") if path.is_file()}
    assert folder / "test_nut" / "model.pth" in kept
    data, other = finished_runs / "data", ("--item", "bottle")
    assert commands.run(*script.words(tmp_path, data, *other, "--phase", "test", "--max_ratio", "0.5")).code == 0
    (test,) = folder.glob("test_max_ratio=0.5*")
    assert "bottle," in (test / "results.csv").read_text()
    finished = commands.run(*script.words(tmp_path, data, *other, "--overwrite"))
    assert finished.code == 0, finished.err
    assert {path: path.read_bytes() for path in kept} == kept
    assert "bottle," not in (test / "results.csv").read_text()  # of the model that was trained anew
    with (folder / "results.csv").open() as file:
        assert [line["item"] for line in csv.DictReader(file)] == ["bottle", "test_nut", "Mean"]


NAMES = {
    "config.yaml": "has a file or folder of that name",
    "Results.CSV": "has a file or folder of that name",
    "model.pth": "has a file or folder of that name",
    "run.lock": "has a file or folder of that name",
    "test_seed=1": "has a file or folder of that name",
    "Mean": "the results use that name",
    "back\\slash": "must not contain a backslash or control characters",
    "line\nerror: forged": "must not contain a backslash or control characters",
    "\x1b[31mred": "must not contain a backslash or control characters",
}


@pytest.mark.parametrize(("reader", "name"), one_with_all([CHECK, *TRAININGS], NAMES, ("config.yaml", "line\nerror: forged")))
def test_categories_that_cannot_name_folders_and_lines(commands, tmp_path, reader, name):
    data = make_mvtec(tmp_path / "data", items=(name,), train=1, good=1, defective=1)
    sentence = reader.refusal(commands, tmp_path, data)
    assert NAMES[name] in sentence
    assert repr(name) in sentence
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("reader", "name"), one_with_all(TRAININGS, ("..", "../up", "/absolute", "a\nb"), ("../up",)))
def test_names_of_runs_stay_in_their_folder(commands, tmp_path, mvtec, reader, name):
    assert "must be a plain name without slashes and control characters" in reader.refusal(
        commands, tmp_path, mvtec, "--save_name", name
    )
    assert not (tmp_path / "runs").exists()


def test_no_cell_is_a_formula_and_no_name_is_markup(commands, tmp_path):
    """Through every table that training and report write."""
    items = ("=schräube 1", "@c", "<img src=x onerror=alert(1)>")
    data = make_mvtec(tmp_path / "data", items=items, train=2, good=2, defective=1)
    (data / "=schräube 1" / "test" / "good" / "=bad.png").write_bytes(b"")
    for name, flags, code in (("=failed", (), 1), ("+skipped", ("--skip_bad_images",), 0)):
        finished = commands.run(*INP_FEW.words(tmp_path, data, "--save_name", name, "--cache_features", "off", *flags))
        assert finished.code == code, finished.err
    runs, flags = list((tmp_path / "runs").glob("[=+]*")), ("--output", tmp_path / "table.md", "--html", tmp_path / "page.html")
    assert commands.run("scripts.report", *runs, *flags).code == 0
    tables = [*(tmp_path / "runs").rglob("*.csv"), tmp_path / "table.csv"]
    names = {"results.csv", "scores.csv", "chosen_files.csv", "bad_images.csv", "failures.csv", "table.csv"}
    assert {path.name for path in tables} == names
    for path in tables:
        with path.open(newline="") as file:
            cells = [cell for line in csv.reader(file) for cell in line if cell]
        assert [cell for cell in cells if cell[0] in "=+-@\t\r" and not is_number(cell)] == [], path
    for page in (runs[0] / "report.html", tmp_path / "page.html", tmp_path / "table.md"):
        assert "<img src=x" not in page.read_text()
        assert "onerror" in page.read_text()


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
