"""The C libraries as commands and threads use them: damaged ones in the cache, no compiler, many threads at once."""

import csv
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from binarize.kernels import engine
from binarize.kernels.library import load_library
from models.selective_scan import selective_scan
from tests.entry_scripts import VARAD
from tests.miniature import save, texture
from tests.packed_files import DECISION
from tests.test_c_library import REPLACED, poison, script
from tests.test_kernels import OPERATORS, example, results
from tests.test_prediction import metadata
from tests.test_runtime import FLOAT, case_of, content_of
from tests.test_selective_scan import example as example_of_scan
from utils.agreement import packed_copy
from utils.packed_model import describe, packed_bytes

WITHOUT_COMPILER = {"CC": "", "PATH": ""}


@pytest.fixture
def quick(compiler, tmp_path) -> dict[str, str]:
    """An empty cache, and a compiler that does not optimise."""
    return {"CC": script(tmp_path / "compiler", f'exec {compiler} "$@" -O0'), "BINARYAD_CACHE": str(tmp_path / "cache")}


@pytest.fixture
def predict(commands, tmp_path):
    """Judge two photographs by a packed stage-2 model with other variables -> the finished command and its table."""
    for seed in range(2):
        save(tmp_path / "photos" / f"{seed}.png", texture(np.random.default_rng(seed)))
    packed = packed_copy(case_of(2, 1, "mixed", 32, 56).trained, FLOAT)
    said = metadata()
    content = {**content_of(2, 1, "mixed"), "protocol": said["protocol"], "calibration": said["calibration"]}
    model = tmp_path / "model.binaryad"
    model.write_bytes(packed_bytes(packed, FLOAT, describe(packed, content, DECISION, said["preprocessing"])))

    def run(variables: dict[str, str]):
        words = ("scripts.predict", "--model", str(model), "--input", str(tmp_path / "photos"))
        finished = commands.run(*words, "--output", str(tmp_path / "out"), env=variables)
        table = tmp_path / "out" / "predictions.csv"
        return finished, list(csv.DictReader(table.open())) if table.is_file() else []

    return run


def library_of(cache: Path, name: str) -> Path:
    """The library in the cache whose name begins so."""
    (path,) = cache.glob(f"{name}-*")
    return path


def test_a_command_compiles_a_damaged_library_again(compiler, predict, quick, tmp_path):
    cache, marker = Path(quick["BINARYAD_CACHE"]), tmp_path / "marker"
    first, expected = predict(quick)
    assert (first.code, len(expected)) == (0, 2)
    library = library_of(cache, "kernels")
    whole = library.read_bytes()
    for content in (whole[: len(whole) // 2], poison(compiler, tmp_path, marker).read_bytes()):
        library.write_bytes(content)
        finished, table = predict(quick)
        assert finished.code == 0, finished.err
        assert REPLACED in finished.err
        assert repr(str(library)) in finished.err
        assert table == expected
        assert not marker.exists()
    quiet, table = predict(quick)
    assert REPLACED not in quiet.err
    assert table == expected


def test_a_training_compiles_a_poisoned_scan_again(compiler, commands, quick, tmp_path, mvtec):
    cache, marker = Path(quick["BINARYAD_CACHE"]), tmp_path / "marker"
    words = VARAD.words(tmp_path, mvtec, "--ssm", "compiled")
    assert commands.run(*words, env=quick).code == 0
    trained = VARAD.model_folder(tmp_path) / "model.pth"
    weights = torch.load(trained, weights_only=True)["model"]
    library_of(cache, "scan").write_bytes(poison(compiler, tmp_path, marker).read_bytes())
    finished = commands.run(*words, "--overwrite", env=quick)
    assert finished.code == 0, finished.err
    assert REPLACED in finished.err
    assert not marker.exists()
    again = torch.load(trained, weights_only=True)["model"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_without_a_compiler_a_command_says_so_and_judges_alike(predict, quick):
    _, expected = predict(quick)
    finished, table = predict({**quick, **WITHOUT_COMPILER})
    assert finished.code == 0, finished.err
    assert "no C compiler found (cc, gcc, clang or $CC): binary layers run in plain torch, correct but slow" in finished.err
    for found, row in zip(table, expected, strict=True):
        assert found["verdict"] == row["verdict"]
        assert float(found["score"]) == pytest.approx(float(row["score"]), abs=1e-4)


def test_without_a_compiler_a_scan_that_was_asked_for_is_refused(commands, quick, tmp_path, mvtec):
    finished = commands.run(*VARAD.words(tmp_path, mvtec, "--ssm", "compiled"), env={**quick, **WITHOUT_COMPILER})
    assert finished.code == 2
    assert (
        "scan backend 'compiled' needs a C compiler that works: install gcc or set CC; choose auto or torch"
        in finished.sentence
    )


def test_instructions_that_this_processor_lacks_are_refused(predict, quick):
    finished, table = predict({**quick, "BINARYAD_ISA": "sse9"})
    assert (finished.code, table) == (2, [])
    assert "BINARYAD_ISA='sse9' does not run on this CPU; choose from" in finished.sentence


def at_once(work: list) -> list:
    """What some functions return that begin together, a thread each."""
    barrier, found = threading.Barrier(len(work)), [None] * len(work)

    def run(place: int) -> None:
        barrier.wait(timeout=60)
        found[place] = work[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return found


@pytest.mark.parametrize("openmp_threads", [1, 2])
def test_threads_that_call_operators_at_once_change_no_bit(openmp_threads):
    if load_library() is None:
        pytest.skip("there is no C compiler")
    before = torch.get_num_threads()
    torch.set_num_threads(openmp_threads)
    try:
        arguments = {name: example(name) for name in OPERATORS}
        expected = {name: results(name, arguments[name]) for name in OPERATORS}
        names = [name for name in OPERATORS for _ in range(2)]
        repeated = at_once([lambda name=name: [results(name, arguments[name]) for _ in range(20)] for name in names])
    finally:
        torch.set_num_threads(before)
    for name, calls in zip(names, repeated, strict=True):
        assert len(calls) == 20
        for found in calls:
            assert all(map(torch.equal, found, expected[name])), name


def scan_and_gradients(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [values.float().requires_grad_() for values in tensors]
    outputs = selective_scan(*leaves, backend="compiled")
    return [outputs.detach(), *torch.autograd.grad(outputs.square().sum(), leaves)]


def test_threads_that_scan_at_once_change_no_bit(compiler):
    problems = [example_of_scan(length, 16) for length in (7, 16, 33, 50)]
    expected = [scan_and_gradients(tensors) for tensors in problems]
    for found in zip(at_once([lambda t=tensors: scan_and_gradients(t) for tensors in problems]), expected, strict=True):
        assert all(map(torch.equal, *found))


def test_the_first_calls_from_several_threads_find_one_engine(compiler, tmp_path, monkeypatch):
    log = tmp_path / "log"
    counting = script(tmp_path / "compiler", f'case "$*" in *-o*) echo run >> {log};; esac\nexec {compiler} "$@" -O0')
    monkeypatch.setenv("CC", counting)
    monkeypatch.setenv("BINARYAD_CACHE", str(tmp_path / "cache"))
    arguments = example("pack")
    expected, before = results("pack", arguments), list(engine._kernels)
    load_library.cache_clear()
    engine._kernels.clear()
    try:
        found = at_once([lambda: results("pack", arguments)] * 6)
    finally:
        load_library.cache_clear()
        engine._kernels[:] = before
    assert all(torch.equal(bits, expected[0]) for (bits,) in found)
    assert log.read_text().split() == ["run"]
    assert os.listdir(tmp_path / "cache") == [library_of(tmp_path / "cache", "kernels").name]
