"""What happens to a process: bugs, signals, lost streams, lost loader processes, too little memory, losses of no number."""

import csv
import errno
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import utils.command
import VarAD
from tests.command_server import ENTRY_SCRIPTS
from tests.conftest import REPOSITORY
from tests.entry_scripts import ALL, DINOMALY, INP_SINGLE, RAAD, VARAD
from tests.miniature import make_mvtec
from utils.checkpoint import load_checkpoint
from utils.killed_trainings import members_of_session

PLUGS = "tests.plugs_of_processes"
TOOLS = sorted(path.stem for path in (REPOSITORY / "scripts").glob("*.py") if path.stem != "__init__")
COMMANDS = [f"{name}.py" for name in ENTRY_SCRIPTS] + [f"scripts.{name}" for name in TOOLS]
NEEDED = {  # flags without which a command does not begin
    "scripts.benchmark": ("--random", "small"),
    "scripts.distill_teacher": ("--images", "x", "--output", "y"),
    "scripts.evaluate": ("--model", "x"),
    "scripts.export": ("--checkpoint", "x", "--output", "y"),
    "scripts.make_buttons": ("--output", "x"),
    "scripts.predict": ("--model", "x", "--input", "y", "--output", "z"),
    "scripts.report": ("x",),
}
HOSTS = (INP_SINGLE, DINOMALY, VARAD, RAAD)
every_host = pytest.mark.parametrize("script", HOSTS, ids=lambda script: script.name)


def plug(name: str, *arguments: object) -> str:
    """A fault of `tests.plugs_of_processes`, as `commands` takes it."""
    return ":".join([PLUGS, name, *map(str, arguments)])


@pytest.mark.parametrize("command", COMMANDS)
def test_bug_is_one_sentence_with_the_way_to_its_traceback(commands, command):
    finished = commands.run(command, *NEEDED.get(command, ()), plug=plug("bug"))
    assert finished.code == 1, finished.err
    assert finished.sentence == "error: unexpected TypeError: a bug of two lines; run again with --debug for the traceback"


@pytest.mark.parametrize("command", ["VarAD.py", "scripts.report"])
@pytest.mark.parametrize(
    ("number", "path", "code", "sentence"),
    [
        (errno.EIO, ["log.txt"], 4, "the system refused: 'log.txt': Input/output error; mend that and run the command again"),
        (errno.EMFILE, [], 4, "the system refused: Too many open files; mend that and run the command again"),
        (
            errno.EISDIR,
            ["a"],
            1,
            "unexpected IsADirectoryError: [Errno 21] Is a directory: 'a'; run again with --debug for the",
        ),
    ],
)
def test_refusal_of_the_system_is_told_from_a_bug(commands, command, number, path, code, sentence):
    finished = commands.run(command, *NEEDED.get(command, ()), plug=plug("refused", number, *path))
    assert finished.code == code
    assert finished.sentence.startswith(f"error: {sentence}")


@pytest.mark.parametrize("command", ["RAAD.py", "scripts.check_dataset"])
def test_bug_has_its_traceback_with_debug(commands, command):
    finished = commands.run(command, "--debug", plug=plug("bug"))
    assert finished.code == 1
    assert finished.err.startswith("Traceback")
    assert "in log_to_terminal" in finished.err
    assert finished.err.endswith("error: unexpected TypeError: a bug of two lines\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_misspelt_flag_is_answered_with_the_nearest_name(commands, command):
    finished = commands.run(command, "--debgu")
    assert finished.code == 2
    assert finished.sentence == "error: unknown flag '--debgu'; did you mean '--debug'?; see --help"
    assert "usage" not in finished.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "error: the following arguments are required: --model, --input, --output; see --help"),
        (("--model", "x", "--input", "--output", "y"), "error: argument --input: expected at least one argument; see --help"),
        (("--pictures=some",), "error: argument --pictures: invalid choice: 'some' (choose from 'all', 'anomalous', 'none')"),
        (("--quie",), "error: unknown flag '--quie'; did you mean '--quiet'?; see --help"),
        (("--zzz=1",), "error: unknown flag '--zzz'; see --help"),
    ],
)
def test_what_argparse_refuses_is_one_sentence(commands, flags, sentence):
    finished = commands.run("scripts.predict", *flags)
    assert finished.code == 2
    assert finished.sentence.startswith(sentence)
    assert "usage" not in finished.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "words", [*((f"{script.name}.py",) for script in ALL), ("-m", "scripts.predict")], ids=lambda it: it[-1]
)
def test_signal_while_libraries_are_imported_ends_without_a_traceback(number, words):
    """The importing of torch, which takes seconds, is where the signal arrives."""
    bootstrap = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background has it ignored
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Interrupting())
words = {words!r}
sys.path.insert(0, "")
sys.argv = [words[0]]
runpy.run_path(words[0], run_name="__main__") if len(words) == 1 else runpy.run_module(words[1], run_name="__main__")
"""
    finished = subprocess.run([sys.executable, "-c", bootstrap], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout, finished.stderr) == (128 + number, "", "")


@pytest.mark.parametrize("first_word", ["-c", "own_line.py", "-m"])
def test_a_program_that_imports_our_packages_keeps_its_signal_handlers_and_its_garbage_collector(first_word):
    bootstrap = f"""
import gc, signal, sys
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
sys.argv = [{first_word!r}]
import common.startup
common.startup.prepare_start()
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
assert gc.isenabled()
"""
    finished = subprocess.run([sys.executable, "-c", bootstrap], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_garbage_is_collected_again_once_everything_is_imported(monkeypatch):
    bootstrap = """
import gc, sys
sys.argv = ["VarAD.py"]
import common.startup
common.startup.prepare_start()
assert not gc.isenabled()
common.startup.end_start()
assert gc.isenabled() and gc.get_freeze_count() > 0
common.startup.prepare_start()
assert gc.isenabled()
"""
    finished = subprocess.run([sys.executable, "-c", bootstrap], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")
    calls = []
    monkeypatch.setattr(utils.command, "end_start", lambda: calls.append(True))
    with pytest.raises(SystemExit):
        VarAD.main(["--debgu"])
    assert calls == [True]


def test_second_signal_while_a_checkpoint_is_saved_ends_at_once_and_keeps_the_old_one(commands, tmp_path, mvtec):
    words = INP_SINGLE.words(tmp_path, mvtec, "--save_every", "1")
    finished = commands.run(*words, plug=plug("signal_in", "saving", 2, "SIGINT", "process", 2))
    assert finished.code == 130  # the first signal arrives in the second save, the other one in the third
    assert "Traceback" not in finished.err
    folder = INP_SINGLE.model_folder(tmp_path)
    assert load_checkpoint(folder / "last.pth")["iteration"] == 2
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("descriptor", [1, 2])
def test_reader_of_a_stream_may_leave(commands, tmp_path, mvtec, descriptor):
    finished = commands.run(*INP_SINGLE.words(tmp_path, mvtec), plug=plug("reader_gone", descriptor))
    assert finished.code == 0
    assert "error" not in finished.err.lower()
    assert (INP_SINGLE.folder(tmp_path) / "results.csv").is_file()


def test_help_may_go_to_a_reader_that_left(commands):
    finished = commands.run("scripts.predict", "--help", plug=plug("reader_gone", 1))
    assert (finished.code, finished.err) == (0, "")


def test_results_that_do_not_fit_where_stdout_goes_are_an_error(commands, mvtec):
    words = ("scripts.check_dataset", "--dataset", "Folder", "--data_path", str(mvtec))
    finished = commands.run(*words, plug=plug("stream_full", 1))
    assert finished.code == 4
    assert finished.sentence.startswith("error: cannot write to standard output: No space left on device")
    assert commands.run(*words, plug=plug("stream_full", 2)).code == 0


def test_started_without_stdout_and_stderr(commands, tmp_path, mvtec):
    finished = commands.run(*INP_SINGLE.words(tmp_path, mvtec), plug=plug("streams_closed"))
    assert (finished.code, finished.out, finished.err) == (0, "", "")
    assert (INP_SINGLE.folder(tmp_path) / "results.csv").is_file()


def test_locale_without_umlauts_and_closed_streams(tmp_path):
    """A process of its own, as Python chooses its alphabet before anything of ours runs."""
    data = make_mvtec(tmp_path / "däta", items=("schräube",), good=1, defective=1)
    words = INP_SINGLE.words(tmp_path, data)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env={**os.environ, **locale, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert b"Traceback" not in errors
    assert b"Logging error" not in errors
    folder = INP_SINGLE.folder(tmp_path)
    rows = list(csv.DictReader((folder / "schräube" / "scores.csv").open(encoding="utf-8")))
    assert {row["path"].startswith(str(data)) for row in rows} == {True}
    assert "schräube" in (folder / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("columns", [1, 120])
def test_terminal_of_any_width_whose_clock_jumps_back(commands, tmp_path, mvtec, columns):
    finished = commands.run(*INP_SINGLE.words(tmp_path, mvtec), plug=plug("terminal", columns))
    assert finished.code == 0, finished.err
    assert "Traceback" not in finished.err
    assert columns < 120 or re.search(r"4/4 \[\d+:\d+<00:00", finished.err)
    assert not re.search(r"\[-|<-|, *-\d", finished.err)


@pytest.mark.parametrize(
    ("folder", "cache", "end", "reason"),
    [
        ("train", "off", "3", "exited unexpectedly with exit code 3"),
        ("train", "ram", "SIGKILL", "is killed by signal: Killed"),
        ("test", "off", "SIGKILL", "is killed by signal: Killed"),
    ],
)
def test_loader_process_that_dies_is_named(commands, tmp_path, mvtec, folder, cache, end, reason):
    words = INP_SINGLE.words(tmp_path, mvtec, "--num_workers", "2", "--cache_features", cache)
    running = commands.start(*words, plug=plug("loader_dies", folder, end))
    finished = running.wait(60)
    assert finished.code == 4, finished.err
    assert re.fullmatch(rf"error: loader process \d+ {reason}; if memory .*", finished.sentence)
    assert members_of_session(running.pid) == []


@every_host
def test_batch_is_halved_where_an_evaluation_has_too_little_memory(commands, tmp_path, script):
    data = make_mvtec(tmp_path / "data", good=2, defective=1)
    words = script.words(tmp_path, data)
    assert commands.run(*words).code == 0
    tables = [script.folder(tmp_path) / "results.csv", *script.folder(tmp_path).rglob("scores.csv")]
    before = [table.read_bytes() for table in tables]
    for table in tables:
        table.unlink()
    finished = commands.run(*words, "--phase", "test", plug=plug("no_device_memory", "evaluation"))
    assert finished.code == 0, finished.err
    assert "halving the batch" in finished.err
    assert [table.read_bytes() for table in tables] == before


@every_host
def test_training_with_too_little_memory_says_what_to_lower(commands, tmp_path, mvtec, script):
    faults = {
        plug("no_device_memory", "training"): r"out of device memory with --batch_size \d; lower it \(results change with it\)",
        plug("no_memory"): r"out of memory; lower --batch_size",
    }
    for fault, advice in faults.items():
        finished = commands.run(*script.words(tmp_path, mvtec, "--overwrite"), plug=fault)
        assert finished.code == 4, finished.err
        assert re.search(advice, finished.sentence)


@every_host
def test_loss_that_is_no_number_keeps_the_last_good_checkpoint(commands, tmp_path, mvtec, script):
    words = script.words(tmp_path, mvtec, "--save_every", "1")
    finished = commands.run(*words, plug=plug("loss_not_finite", 2))
    assert finished.code == 3, finished.err
    assert "loss nan" in finished.sentence
    assert "at iteration 2 " in finished.sentence
    assert str(mvtec / "bottle" / "train" / "good") in finished.sentence
    last = script.model_folder(tmp_path) / "last.pth"
    assert repr(str(last)) in finished.sentence
    content = load_checkpoint(last)
    assert content["iteration"] == 2
    assert all(value.isfinite().all() for value in content["model"].values() if value.is_floating_point())
    assert not last.with_name("model.pth").exists()


@pytest.fixture
def words_of(tmp_path, mvtec):
    """Command lines that come as far as to choose a device."""
    image = mvtec / "bottle" / "test" / "good" / "000.png"
    data = ("--dataset", "Folder", "--data_path", str(mvtec))
    tools = {
        "scripts.predict": ("--model", "absent", "--input", str(image), "--output", str(tmp_path / "out")),
        "scripts.evaluate": ("--model", "absent", *data),
        "scripts.distill_teacher": ("--images", str(mvtec), "--output", str(tmp_path / "teacher.safetensors")),
    }
    return {script.name: script.words(tmp_path, mvtec) for script in ALL} | {
        name: [name, *words] for name, words in tools.items()
    }


WITH_DEVICE = [*(script.name for script in ALL), "scripts.predict", "scripts.evaluate", "scripts.distill_teacher"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("command", WITH_DEVICE)
def test_absent_device_is_answered_with_those_that_are_there(commands, words_of, command):
    finished = commands.run(*words_of[command], "--device", "cuda")
    assert finished.code == 2
    assert finished.sentence == "error: --device 'cuda' is not available here; choose from auto cpu"


@pytest.mark.parametrize("command", WITH_DEVICE)
def test_number_of_an_absent_gpu_is_answered_with_the_list(commands, words_of, command):
    finished = commands.run(*words_of[command], "--device", "cuda:2", plug=plug("two_gpus"))
    assert finished.code == 2
    assert finished.sentence == "error: --device 'cuda:2' is not available here; choose from auto cpu cuda:0 cuda:1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_device_that_is_chosen_automatically_is_said(commands, tmp_path, mvtec):
    finished = commands.run(*INP_SINGLE.words(tmp_path, mvtec, "--device", "auto"))
    assert finished.code == 0
    assert "device: cpu (--device auto)" in finished.err
