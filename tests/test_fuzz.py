"""Fifty mutants of every file that the program reads, and proofs that the fuzzer sees what it is meant to see."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from tests.fuzz_engine import REFUSED, Limits, Reader, Summary, Workspace, fuzz, mutant
from tests.fuzz_readers import READERS

MUTANTS, SEED = 50, 0


@pytest.fixture(scope="module")
def worker():
    """A new process that has never computed with several threads, so that it may fork."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            yield executor


def fuzz_by_name(name: str, folder: Path, start: int = 0, count: int = MUTANTS) -> Summary:
    return fuzz(READERS[name], folder, count, SEED, start=start)


@pytest.mark.parametrize("name", READERS)
def test_no_mutant_of_a_file_does_harm(worker, tmp_path, name):
    summary = worker.submit(fuzz_by_name, name, tmp_path).result()
    assert len(summary.verdicts) == MUTANTS
    assert not summary.failures, (
        f"\n{summary.describe()}\nlook at one with `python -m tests.fuzz --reader {name!r} --only NUMBER`"
    )


# found by the long form, in mutants beyond the first fifty
FOUND = [
    ("timing.json reported", 83),  # a text that no file can hold
    ("timing.json reported", 129),  # less than no time
    ("pixel_errors.csv resumed", 86),  # an error of 150 %
    ("results.csv reported", 435),  # a category that no folder can be called
    ("image .png RGB", 450),  # a second orientation behind the pixels
    ("image .tif RGB", 471),  # PIL logs what it raises
    ("mask .png", 561),  # a length of gigabytes
]


@pytest.mark.parametrize(("name", "number"), FOUND)
def test_what_was_found_once_stays_mended(worker, tmp_path, name, number):
    assert not worker.submit(fuzz_by_name, name, tmp_path, number, 1).result().failures


# ---- readers that are wrong on purpose


CONTENT = "a checksum would see every change " * 20


def make_text(folder: Path, variant: int) -> Path:
    (folder / "file.txt").write_text(CONTENT + str(variant))
    return folder / "file.txt"


def make_weights(folder: Path, variant: int) -> Path:
    torch.save({"weight": torch.arange(5.0) + variant}, folder / "file.pth")
    return folder / "file.pth"


def refusing(path: Path) -> str:
    """The sound reader that the wrong ones differ from."""
    if path.read_text(errors="replace")[:-1] != CONTENT:
        raise UserError(f"damaged: {str(path)!r} was changed; copy it again")
    return "content"


def unpickling(path: Path) -> dict:
    try:
        return torch.load(path, weights_only=False)
    except Exception as error:
        raise UserError(f"damaged: {str(path)!r}") from error


def writing_outside(path: Path) -> str:
    (path.parents[1] / "leaked").write_text("x")
    (path.parents[1] / "leaked").unlink()
    return refusing(path)


def removing_outside(path: Path) -> str:
    (path.parents[1] / "leaked").unlink(missing_ok=True)
    return refusing(path)


def reading_outside(path: Path) -> str:
    (path.parents[1] / "outside" / "secret.txt").read_text()
    return "content"


def running_a_program(path: Path) -> str:
    os.system("true")  # noqa: S605
    return refusing(path)


def noticing_nothing(path: Path) -> bytes:
    return path.read_bytes()


def looping(path: Path) -> str:
    try:
        return refusing(path)
    except UserError:
        while True:
            pass


def sleeping(path: Path) -> str:
    try:
        return refusing(path)
    except UserError:
        time.sleep(1000)


def crashing(path: Path) -> str:
    try:
        return refusing(path)
    except UserError:
        os.abort()


def swallowing_memory(path: Path) -> str:
    try:
        return refusing(path)
    except UserError:
        return str(len(bytes(2**32)))


def without_its_name(path: Path) -> str:
    try:
        return refusing(path)
    except UserError:
        raise UserError("some file is damaged") from None


def in_two_lines(path: Path) -> str:
    try:
        return refusing(path)
    except UserError as error:
        error.args = (f"{error}\nsee above",)  # a new one would be brought into one line
        raise


def with_a_traceback(path: Path) -> str:
    try:
        return refusing(path)
    except UserError:
        return {}["content"]


def chatting(path: Path) -> str:
    os.write(2, b"a library says something\n")
    return refusing(path)


def warning(path: Path) -> str:
    warnings.warn("a library says something", stacklevel=1)
    return refusing(path)


def connecting(path: Path) -> str:
    with contextlib.suppress(OSError), socket.socket() as stranger:
        stranger.connect(("127.0.0.1", 9))
    return refusing(path)


WRONG = {
    unpickling: "execution",
    writing_outside: "writes outside",
    removing_outside: "writes outside",
    reading_outside: "reads outside",
    running_a_program: "execution",
    noticing_nothing: "silent wrong result",
    looping: "takes too long",
    sleeping: "hangs",
    crashing: "process ended",
    swallowing_memory: "takes too much memory",
    without_its_name: "bad sentence",
    in_two_lines: "bad sentence",
    with_a_traceback: "unexpected exception",
    chatting: "printed by a library",
    warning: "warning of a library",
    connecting: "network",
}
QUICK = Limits(seconds=0.5, megabytes=256, patience=3)


def fuzz_wrong(read: Callable[[Path], object], folder: Path) -> Summary:
    """The first mutants, or for torch's files those with pickles."""
    is_torch = read is unpickling
    reader = Reader(read.__name__, make_weights if is_torch else make_text, read, "torch" if is_torch else "bytes", sealed=True)
    return fuzz(reader, folder, 3, SEED, QUICK, start=13 if is_torch else 0)


@pytest.mark.parametrize(("read", "failure"), WRONG.items(), ids=[read.__name__ for read in WRONG])
def test_wrong_readers_are_found(worker, tmp_path, read, failure):
    summary = worker.submit(fuzz_wrong, read, tmp_path).result()
    assert failure in [verdict.outcome for verdict in summary.failures], summary.describe()


def test_a_sound_reader_passes_and_mutants_can_be_made_again(worker, tmp_path):
    summary = worker.submit(fuzz_wrong, refusing, tmp_path / "first").result()
    assert [verdict.outcome for verdict in summary.verdicts] == [REFUSED] * 3
    assert [verdict.mutation for verdict in summary.verdicts] == ["flip_bit", "change_byte", "truncate"]
    text = Reader("text", make_text, refusing, "bytes")
    sources = [Workspace(text, tmp_path / name).source for name in ("second", "third")]
    for index in range(22):
        one, other = (mutant(text, source, SEED, index)[1] for source in sources)
        assert one == other != sources[0].content
