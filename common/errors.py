"""Errors that end a command with one sentence and a fixed exit code.

Exit codes: 0 ok, 2 usage or data, 3 numeric failure, 4 environment (disk, memory, lock), 130/143 signals.
"""

import re

_LONGEST, _LAST = 1900, 300  # letters of a message, and of its end, which says what to do
_WORKER_PREFIX = re.compile(r"^Caught \w+ in DataLoader worker process \d+\.", re.MULTILINE)


def _without_worker_traceback(message: str, class_name: str) -> str:
    """A DataLoader worker re-raises its error with a traceback as text; keep only the sentence."""
    if not _WORKER_PREFIX.match(message):
        return message
    return message.rsplit(f"{class_name}: ", 1)[-1].strip()


def _one_line(message: str) -> str:
    """The message as one line that a terminal can show: what it quotes from files may be anything, and of any length."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - _LAST]} ... {line[-_LAST:]}"


class CommandError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(_one_line(_without_worker_traceback(message, type(self).__name__)))


class UserError(CommandError):
    """A wrong flag, a wrong file or a broken data set."""

    exit_code = 2


class NumericError(CommandError):
    """A loss or a map that is not finite."""

    exit_code = 3


class ResourceError(CommandError):
    """Disk, memory or lock: the machine cannot do what was asked."""

    exit_code = 4


class Interrupted(BaseException):
    """A signal ended the command; nothing but an orderly exit should catch it."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number
