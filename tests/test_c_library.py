"""Compiled libraries in the cache: a damaged or foreign one is never loaded, others' folders are not trusted, nothing is half.

A child process loads each, since a library that is loaded though it was cut short ends its process with SIGBUS.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from common.c_library import compile_sources, open_library
from tests.conftest import REPOSITORY

SOURCE = "int answer(void) { return 42; }\n"
REPLACED = "it is not loaded, but compiled again"
CHILD = """
import logging, sys
from pathlib import Path
from common.c_library import open_library

logging.basicConfig(format="%(message)s")
print(open_library("answer", [Path(sys.argv[1])], "answers").answer())
"""


@pytest.fixture
def source(tmp_path) -> Path:
    """C code with one function."""
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    return path


def start(source: Path, cache: Path, **variables: str) -> subprocess.Popen:
    """Another process that opens the library and prints its answer."""
    environment = {**os.environ, "BINARYAD_CACHE": str(cache), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(source)], cwd=REPOSITORY, env=environment, **pipes)


def warnings_of(process: subprocess.Popen) -> str:
    """What a process that must have answered wrote to stderr."""
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (0, "42\n"), errors
    return errors


def library_in(cache: Path) -> Path:
    """The one file in the cache."""
    (path,) = cache.iterdir()
    return path


def script(path: Path, text: str) -> str:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def poison(compiler: str, folder: Path, marker: Path) -> Path:
    """A whole library of other sources, with its own checksum, that makes the marker when it is loaded."""
    source = folder / "poison.c"
    body = f'fclose(fopen("{marker}", "w"));'
    source.write_text(f"#include <stdio.h>\n__attribute__((constructor)) static void run(void) {{ {body} }}\n{SOURCE}")
    return compile_sources("answer", [source], compiler, folder / "poisoned")


def flip(content: bytes, place: int) -> bytes:
    """One bit of one byte turned."""
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "first page": lambda content: content[:4096],
    "half": lambda content: content[: len(content) // 2],
    "without checksum": lambda content: content[:-32],
    "last byte missing": lambda content: content[:-1],
    "second half zeros": lambda content: content[: len(content) // 2].ljust(len(content), b"\0"),
    "a byte more": lambda content: content + b"\0",
    "text": lambda content: b"this is no library",
    "first bit": lambda content: flip(content, 0),
    "last bit": lambda content: flip(content, len(content) - 1),
    **{f"bit {seed}": lambda content, seed=seed: flip(content, Random(seed).randrange(len(content))) for seed in range(3)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_compiled_again(compiler, source, tmp_path, damage):
    cache = tmp_path / "cache"
    assert warnings_of(start(source, cache)) == ""
    library = library_in(cache)
    whole = library.read_bytes()
    library.write_bytes(DAMAGES[damage](whole))
    warning = warnings_of(start(source, cache))
    assert REPLACED in warning
    assert repr(str(library)) in warning
    assert library_in(cache).read_bytes()[:4] == b"\x7fELF"
    inode = library.stat().st_ino
    assert warnings_of(start(source, cache)) == ""
    assert library.stat().st_ino == inode


@pytest.mark.parametrize("kind", ["with the checksum of other sources", "without checksum"])
def test_another_library_in_its_place_is_never_loaded(compiler, source, tmp_path, kind):
    cache, marker = tmp_path / "cache", tmp_path / "marker"
    warnings_of(start(source, cache))
    poisoned = poison(compiler, tmp_path, marker)
    content = poisoned.read_bytes()
    library_in(cache).write_bytes(content if kind.startswith("with the") else content[:-32])
    assert REPLACED in warnings_of(start(source, cache))
    assert not marker.exists()
    shutil.copy(poisoned, tmp_path / "loaded.so")
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(tmp_path / 'loaded.so')!r})"], check=True)
    assert marker.exists()  # so it would have been made


@pytest.mark.parametrize("kind", ["pipe", "pipe that is open", "link to nothing", "link to another file"])
def test_what_is_no_plain_file_is_replaced(compiler, source, tmp_path, kind):
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    warnings_of(start(source, cache))
    library = library_in(cache)
    library.unlink()
    if kind.startswith("pipe"):
        os.mkfifo(library)
        writer = os.open(library, os.O_RDWR) if kind == "pipe that is open" else None
    else:
        library.symlink_to(elsewhere)
    if kind == "link to another file":
        elsewhere.write_bytes(b"precious")
    assert (REPLACED in warnings_of(start(source, cache))) == (kind != "link to nothing")
    if kind == "pipe that is open":
        os.close(writer)
    assert library.is_file()
    assert not library.is_symlink()
    assert elsewhere.exists() == (kind == "link to another file")
    if elsewhere.exists():
        assert elsewhere.read_bytes() == b"precious"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_that_dies_in_the_compiler_leaves_no_library(compiler, source, tmp_path, when):
    kill = 'case "$*" in *-o*) kill -9 $PPID;; esac'
    real = f'{compiler} "$@"'
    dying = script(tmp_path / "compiler", f"{real}\n{kill}" if when == "after" else f"{kill}\n{real}")
    cache = tmp_path / "cache"
    killed = start(source, cache, CC=dying)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not list(cache.glob("answer-*"))
    assert warnings_of(start(source, cache)) == ""


def test_the_new_name_is_given_when_all_bytes_are_on_the_disk(compiler, source, tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_replace(temporary: str, library: Path) -> None:
        assert events == [os.stat(temporary).st_ino]
        assert Path(temporary).parent == library.parent
        replace(temporary, library)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    library = compile_sources("answer", [source], compiler, tmp_path / "cache")
    assert events == [library.stat().st_ino]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_library_that_cannot_be_kept_leaves_nothing(compiler, source, tmp_path, monkeypatch, failing):
    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        compile_sources("answer", [source], compiler, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("owner_or_mode", [0o777, 0o1777, 0o770, "another user"])
def test_a_folder_that_others_may_write_is_not_used(compiler, source, tmp_path, owner_or_mode):
    if owner_or_mode == "another user" and os.getuid() != 0:
        pytest.skip("only root can give folders away")
    cache, marker = tmp_path / "cache", tmp_path / "marker"
    warnings_of(start(source, cache))
    library = library_in(cache)
    poisoned = poison(compiler, tmp_path, marker).read_bytes()
    library.write_bytes(poisoned)
    if owner_or_mode == "another user":
        os.chown(cache, 12345, -1)
    else:
        cache.chmod(owner_or_mode)
    private = tmp_path / "private"
    private.mkdir()
    warning = warnings_of(start(source, cache, TMPDIR=str(private)))
    assert "no cache for the answer" in warning
    assert f"{str(cache)!r} belongs to user" in warning
    assert "others may write there" in warning
    assert not marker.exists()
    assert library_in(cache).read_bytes() == poisoned  # left alone
    assert list(private.iterdir()) == []


def test_processes_that_find_the_same_damage_at_once(compiler, source, tmp_path):
    barrier, cache = tmp_path / "barrier", tmp_path / "cache"
    barrier.mkdir()
    waiting = script(
        tmp_path / "compiler",
        f"""case "$*" in *-o*) touch {barrier}/$$
for i in $(seq 600); do [ $(ls {barrier} | wc -l) -ge 3 ] && break; sleep 0.1; done;; esac
exec {compiler} "$@\"""",
    )
    warnings_of(start(source, cache))
    library = library_in(cache)
    library.write_bytes(library.read_bytes()[:5000])
    for warning in map(warnings_of, [start(source, cache, CC=waiting) for _ in range(3)]):
        assert REPLACED in warning
    assert len(list(barrier.iterdir())) == 3
    library_in(cache)  # no temporary file is left
    assert warnings_of(start(source, cache)) == ""


def test_threads_compile_once(compiler, source, tmp_path, monkeypatch):
    log = tmp_path / "log"
    counting = script(tmp_path / "compiler", f'case "$*" in *-o*) echo run >> {log};; esac\nexec {compiler} "$@"')
    monkeypatch.setenv("CC", counting)
    monkeypatch.setenv("BINARYAD_CACHE", str(tmp_path / "cache"))
    barrier, answers = threading.Barrier(6), []

    def ask() -> None:
        barrier.wait(timeout=60)
        answers.append(open_library("answer", [source], "answers").answer())

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert answers == [42] * 6
    assert log.read_text().split() == ["run"]


@pytest.mark.parametrize("chosen", ["no-such-compiler", ""])
def test_without_a_compiler_it_is_said_what_runs_instead(source, tmp_path, monkeypatch, caplog, chosen):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", chosen)
    with caplog.at_level(logging.WARNING):
        assert open_library("answer", [source], "answers") is None
    *before, last = [record.getMessage() for record in caplog.records]
    assert last == "no C compiler found (cc, gcc, clang or $CC): answers run in plain torch, correct but slow"
    expected = ["CC='no-such-compiler' is no program on the path; looking for cc, gcc and clang"] if chosen else []
    assert before == expected
