"""Standard streams that never end a command: their reader may leave, and they take every character."""

import errno
import io
import os
import sys

from common.errors import ResourceError

_NOBODY_READS = (errno.EPIPE, errno.EIO)  # `| head` has ended, the terminal is gone


class _StandardFile(io.FileIO):
    """A standard stream; after an error all further text goes nowhere."""

    def __init__(self, descriptor: int, name: str):
        super().__init__(descriptor, "w", closefd=False)
        self.output = name

    def write(self, data) -> int | None:
        """As FileIO.

        Raises:
            ResourceError: text of stdout is lost, although somebody wants it.
        """
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self.output == "stdout" and error.errno not in _NOBODY_READS:
                raise ResourceError(
                    f"cannot write to standard output: {error.strerror}; make room where it goes, and run the command again"
                ) from error
            return len(data)


def protect_standard_streams() -> None:
    """Replace stdout and stderr of the interpreter by streams that no reader and no alphabet can break."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when the process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and not isinstance(getattr(stream.buffer, "raw", None), _StandardFile):
            setattr(sys, name, _protected(stream, descriptor, name))


def _protected(stream: io.TextIOWrapper, descriptor: int, name: str) -> io.TextIOWrapper:
    raw = _StandardFile(descriptor, name)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",  # a file name need not fit into the terminal's alphabet
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
