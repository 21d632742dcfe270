"""Real commands in tests: start one, look at what it prints, signal it, wait for it."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.command_server import REPOSITORY
from utils.killed_trainings import environments_of_ranks

_SECONDS_TO_FOLLOW = 10


@dataclass(frozen=True)
class Finished:
    """What a command left: exit code (negative: ended by that signal), standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line that says what went wrong; fails where there is none, more than one, or a traceback."""
        assert "Traceback" not in self.err, self.err
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        return errors[0]


class Running:
    """A command at work."""

    def __init__(self, connection: socket.socket, output: Path, errors: Path):
        self._connection, self._stream = connection, connection.makefile()
        self._output, self._errors = output, errors
        self.ended = False
        self.pid = int(self._stream.readline())

    def send(self, number: int, group: bool = False) -> None:
        """Send a signal to the process, or to its whole group."""
        (os.killpg if group else os.kill)(self.pid, number)

    def has_ended(self, seconds: float = 0) -> bool:
        """True if it ends within so many seconds."""
        return self.ended or bool(select.select([self._connection], [], [], seconds)[0])

    def err_so_far(self) -> str:
        """What stands in its standard error by now."""
        return self._errors.read_text(errors="replace")

    def wait(self, timeout: float = 120) -> Finished:
        """Wait for the end; a command that takes longer than `timeout` seconds is killed and fails the test."""
        self._connection.settimeout(timeout)
        try:
            code = int(self._stream.readline())
        except TimeoutError:
            self.send(signal.SIGKILL, group=True)
            raise AssertionError(f"still running after {timeout} s:\n{self.err_so_far()}") from None
        finally:
            self.ended = True
            self._connection.close()
        return Finished(code, self._output.read_text(errors="replace"), self._errors.read_text(errors="replace"))


class Commands:
    """Starts commands by a server (see `tests.command_server`), which lives as long as the tests."""

    def __init__(self, folder: Path, costs: Path):
        """The folder of the commands' output, and that of counted costs (see `tests.remembered_costs`)."""
        self._folder, self._count = folder, 0
        self._started: list[Running] = []
        self._server = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests" / "command_server.py"), str(folder / "socket"), str(costs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._server.stdout.readline() == "ready\n"

    def close(self) -> None:
        """End the server, and what a failed test left running."""
        for running in self._started:
            if not running.ended:
                running.send(signal.SIGKILL, group=True)
                running.wait()
        self._server.communicate(timeout=30)

    def start(self, *words: str, plug: str | None = None, env: dict | None = None, cwd: Path = REPOSITORY) -> Running:
        """Start a command.

        Args:
            words: an entry script (`VarAD.py`), another script's path or a module (`scripts.predict`), and its arguments.
            plug: `module:function` or `module:function:argument`, called in the process before the command begins.
            env: what its environment has beside this process's.
        """
        self._count += 1
        output, errors = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        output.touch()
        errors.touch()
        request = {
            "words": [str(word) for word in words],
            "folder": str(cwd),
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            "output": str(output),
            "errors": str(errors),
            "plug": plug,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._folder / "socket"))
        connection.sendall(json.dumps(request).encode() + b"\n")
        running = Running(connection, output, errors)
        self._started.append(running)
        return running

    def run(self, *words: str, timeout: float = 120, **options) -> Finished:
        """Start a command (see `start`) and wait for its end."""
        return self.start(*words, **options).wait(timeout)

    def start_two(self, *words: str) -> list[Running]:
        """Start a command as two processes that know of each other as under torchrun, which itself is not there."""
        return [self.start(*words, env=environment) for environment in environments_of_ranks(2)]


def joint_errors(processes: list[Running], timeout: float = 180) -> str:
    """What the processes of one command wrote to standard error; fails unless all end with exit code 0.

    If one of them fails, the others have a few seconds to follow.
    """
    deadline, codes = time.monotonic() + timeout, []
    waiting = list(processes)
    while waiting and time.monotonic() < deadline:
        for process in [each for each in waiting if each.has_ended(0.05)]:
            waiting.remove(process)
            codes.append(process.wait().code)
            if codes[-1]:
                deadline = min(deadline, time.monotonic() + _SECONDS_TO_FOLLOW)
    for process in waiting:
        process.send(signal.SIGKILL, group=True)
        codes.append(process.wait().code)
    errors = "".join(process.err_so_far() for process in processes)
    assert codes == [0] * len(processes), errors
    return errors
