"""Two commands and one folder: exactly one of them writes, and no lock outlives its process."""

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
from pathlib import Path

import pytest

from common.errors import ResourceError
from tests.entry_scripts import INP_SINGLE
from utils.checkpoint import load_checkpoint
from utils.run_lock import run_lock

ROUNDS = 20
HERE = socket.gethostname()

_STARTED: list["Starter"] = []


@pytest.fixture(autouse=True)
def nothing_left_running():
    """A failed test leaves no process behind."""
    yield
    while _STARTED:
        starter = _STARTED.pop()
        with contextlib.suppress(ProcessLookupError):
            os.kill(starter.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(starter.pid, 0)


class Starter:
    """A forked process that waits for a word, takes the lock if it can, says so, and holds it until the next word."""

    def __init__(self, folder: Path, name: str = "run.lock"):
        self._words, self._told = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._hold(folder, name)
        _STARTED.append(self)
        self.tell()  # so that it has begun, and is as near to the lock as the other one
        os.close(self._words[0])
        os.close(self._told[1])

    def _hold(self, folder: Path, name: str) -> None:
        os.write(self._told[1], b"ready")
        os.read(self._words[0], 1)
        try:
            with run_lock(folder, name=name):
                os.write(self._told[1], b"holds")
                os.read(self._words[0], 1)
        except ResourceError as error:
            os.write(self._told[1], str(error).encode())
        except BaseException as error:
            os.write(self._told[1], repr(error).encode())
        os._exit(0)

    def word(self) -> None:
        """Let it go on."""
        os.write(self._words[1], b".")

    def tell(self) -> str:
        """What it says next."""
        assert select.select([self._told[0]], [], [], 60)[0], "says nothing"
        return os.read(self._told[0], 10_000).decode()

    def kill(self) -> None:
        """End it without a chance to tidy up."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """Let it end."""
        os.waitpid(self.pid, 0)
        os.close(self._words[1])
        os.close(self._told[0])


@pytest.mark.parametrize(
    "stale", ["", f"process 999999999 on {HERE}\n", f"process {os.getpid()} on {HERE}\n"], ids=["none", "gone", "ours"]
)
def test_of_two_that_start_at_once_exactly_one_wins(tmp_path, stale):
    """Also over the lock of a process that is gone, or whose number another process has now: this one."""
    lock = tmp_path / "run.lock"
    for _ in range(ROUNDS):
        if stale:
            lock.write_text(stale)
        both = [Starter(tmp_path), Starter(tmp_path)]
        for starter in both:
            starter.word()
        said = [starter.tell() for starter in both]
        assert said.count("holds") == 1, said
        winner = said.index("holds")
        named = os.getpid() if str(os.getpid()) in said[1 - winner] and stale else both[winner].pid
        assert said[1 - winner] == f"{str(tmp_path)!r} is in use by process {named} on {HERE}; wait for its end"
        both[winner].word()
        for starter in both:
            starter.wait()
        assert not lock.exists()


def test_lock_file_that_was_removed_meanwhile_is_not_held(tmp_path, monkeypatch):
    """Its holder removes it between another process's opening and locking of it."""
    original, paths = fcntl.lockf, []

    def lockf(descriptor: int, action: int) -> None:
        if not paths:
            (tmp_path / "run.lock").unlink()
        paths.append(descriptor)
        original(descriptor, action)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with run_lock(tmp_path):
        assert len(paths) == 2
        assert (tmp_path / "run.lock").read_text() == f"process {os.getpid()} on {HERE}\n"


def test_lock_of_a_killed_process_frees_itself(tmp_path, caplog):
    holder = Starter(tmp_path)
    holder.word()
    assert holder.tell() == "holds"
    holder.kill()
    assert (tmp_path / "run.lock").exists()
    with run_lock(tmp_path):
        pass
    assert f"took over the lock of process {holder.pid}, which is gone" in caplog.text


def test_lock_is_not_inherited_by_loader_processes(tmp_path):
    """Those of a killed process live on for some seconds."""
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        lock = run_lock(tmp_path)
        lock.__enter__()
        loader = os.fork()
        if not loader:
            signal.alarm(60)
            signal.pause()
        os.write(writing, str(loader).encode())
        os._exit(0)
    os.waitpid(holder, 0)
    os.close(writing)
    loader = int(os.read(reading, 20))
    os.close(reading)
    try:
        held(tmp_path)
    finally:
        os.kill(loader, signal.SIGKILL)


def test_lock_of_another_machine_is_not_taken_over(tmp_path):
    (tmp_path / "run.lock").write_text("process 12 on another-machine\n")
    with pytest.raises(ResourceError, match=r"process 12 on another-machine; if that no longer runs there, remove 'run\.lock'"):
        run_lock(tmp_path).__enter__()
    assert (tmp_path / "run.lock").read_text() == "process 12 on another-machine\n"


def test_lock_that_a_user_removed_and_another_took_is_left_to_it(tmp_path):
    with run_lock(tmp_path):
        (tmp_path / "run.lock").unlink()
        (tmp_path / "run.lock").write_text("another's")
    assert (tmp_path / "run.lock").read_text() == "another's"


def test_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "thesis.txt").write_text("two years of work")
    (tmp_path / "run.lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(ResourceError, match=r"cannot write .*run\.lock"):
        run_lock(tmp_path).__enter__()
    assert (tmp_path / "thesis.txt").read_text() == "two years of work"


@pytest.mark.parametrize(("holder", "refused"), [("process 999999999 on", False), (f"process {os.getppid()} on", True)])
def test_without_locks_of_the_file_system_a_running_holder_counts(tmp_path, monkeypatch, caplog, holder, refused):
    def lockf(descriptor: int, action: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    (tmp_path / "run.lock").write_text(f"{holder} {HERE}\n")
    if refused:
        with pytest.raises(ResourceError, match=f"is in use by {holder}"):
            run_lock(tmp_path).__enter__()
    else:
        with run_lock(tmp_path):
            assert "the file system has no locks" in caplog.text


def held(folder: Path, name: str = "run.lock") -> int:
    """Hold a folder by a process of its own until the test ends; returns its number."""
    holder = Starter(folder, name)
    holder.word()
    assert holder.tell() == "holds"
    return holder.pid


def test_second_command_is_refused_and_names_the_first(commands, tmp_path, mvtec):
    """Every command that writes a folder over some time."""
    words = INP_SINGLE.words(tmp_path, mvtec)
    assert commands.run(*words).code == 0
    image = mvtec / "bottle" / "test" / "good" / "000.png"
    folder, output = INP_SINGLE.folder(tmp_path), tmp_path / "out"
    holder = held(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.name != "run.lock" and path.is_file()}
    for flags in (("--overwrite",), ("--resume",), ("--phase", "test"), ("--phase", "test", "--max_ratio", "0")):
        finished = commands.run(*words, *flags)
        assert finished.code == 4
        assert finished.sentence == f"error: {str(folder)!r} is in use by process {holder} on {HERE}; wait for its end"
    assert {path: path.read_bytes() for path in before} == before

    holder = held(output)
    finished = commands.run("scripts.predict", "--model", "x", "--input", str(image), "--output", str(output))
    assert (finished.code, f"process {holder} on" in finished.sentence) == (4, True)
    holder = held(tmp_path, name="teacher.safetensors.lock")
    finished = commands.run(
        "scripts.distill_teacher", "--images", str(mvtec), "--output", str(tmp_path / "teacher.safetensors")
    )
    assert (finished.code, f"process {holder} on" in finished.sentence) == (4, True)


def test_command_that_was_killed_holds_nothing(commands, tmp_path, mvtec):
    words = INP_SINGLE.words(tmp_path, mvtec, "--save_every", "1")
    finished = commands.run(*words, plug="tests.plugs_of_processes:signal_in:training:3:SIGKILL:process")
    assert finished.code == -signal.SIGKILL
    assert (INP_SINGLE.folder(tmp_path) / "run.lock").exists()
    finished = commands.run(*words, "--resume")
    assert finished.code == 0, finished.err
    assert "took over the lock of process" in finished.err
    assert not (INP_SINGLE.folder(tmp_path) / "run.lock").exists()
    assert load_checkpoint(INP_SINGLE.model_folder(tmp_path) / "model.pth")["kind"]
