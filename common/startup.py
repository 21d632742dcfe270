"""The seconds in which a command imports its libraries: a signal ends it without a traceback, and they are as few as can be.

The packages `utils` and `scripts` call `prepare_start` before they import anything slow, as nothing else runs earlier;
the command itself calls `end_start` when everything is imported.
"""

import gc
import os
import signal
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_ENTRY_SCRIPTS = {
    *("Binary_Dinomaly.py", "Binary_INP_Few_Shot.py", "Binary_INP_Multi_Class.py", "Binary_INP_Single_Class.py"),
    *("RAAD.py", "VarAD.py"),
}
_collector_rests: bool | None = None  # None before `prepare_start`, False after `end_start`


def prepare_start() -> None:
    """Let SIGINT and SIGTERM end the process with 130 and 143, and occupy closed standard streams, if this is a command."""
    global _collector_rests
    if not _is_command():
        return
    for number, untouched in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == untouched:  # a job in the background inherits "ignore"
            signal.signal(number, _end_at_once)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # the next file that is opened would get this number, and messages of libraries with it
            os.open(os.devnull, os.O_RDWR)
    if _collector_rests is None:
        _collector_rests = True
        gc.disable()  # it would look again and again at what imports make, which all stays: a quarter of their time


def end_start() -> None:
    """Switch the garbage collector on again where `prepare_start` switched it off; what was imported it never looks at."""
    global _collector_rests
    if _collector_rests:
        _collector_rests = False
        gc.freeze()
        gc.enable()


def _is_command() -> bool:
    """True if the interpreter was started on an entry script or with `-m scripts...`, not on tests or another program.

    A program of somebody else that imports our packages keeps its own way of ending, also if it lies beside the entry scripts.
    """
    if sys.argv[0] == "-m":  # Python looks for the module still, and imports the packages that it lies in
        return "scripts" in sys.modules
    script = Path(sys.argv[0]).resolve()
    return script.parent == _ROOT and script.name in _ENTRY_SCRIPTS


def _end_at_once(number: int, frame) -> None:
    os._exit(128 + number)  # nothing has begun, so there is nothing to tidy up
