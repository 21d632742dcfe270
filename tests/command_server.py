"""Forks commands from one process that has imported everything, so that a test pays for a command's own work alone.

Each command is a process of its own, in a session of its own, that begins and ends as `python script.py` does: own arguments,
environment, folder, output files, exit code, handlers at exit. What it shares with its siblings is only what importing leaves
behind; a variable that a library reads while it is imported (HF_HUB_OFFLINE, OMP_NUM_THREADS) is the server's.

Protocol over the Unix socket whose path is the first argument, one connection per command: the client sends one line of JSON
(`words`, `folder`, `environment`, `output`, `errors`, `plug`), the server answers with the process number and, in the end, with
the exit code, negative for a signal. It ends when its standard input does. The second argument is the folder of counted costs
(see `tests.remembered_costs`).
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ENTRY_SCRIPTS = (
    "Binary_INP_Single_Class",
    "Binary_INP_Multi_Class",
    "Binary_INP_Few_Shot",
    "Binary_Dinomaly",
    "VarAD",
    "RAAD",
)
TOOLS = ("check_dataset", "distill_teacher", "evaluate", "export", "predict", "report")


def serve(path: str) -> dict | None:
    """Answer requests until the input ends; returns None then and, in each forked command, its request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the waiting processes need no funeral
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [])
            if sys.stdin in ready:
                return None
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                return _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> dict:
    """Fork the command, wait for it and report; returns in the command only."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection, connection.makefile("rw") as stream:
        request = json.loads(stream.readline())
        process = os.fork()
        if process:
            print(process, file=stream, flush=True)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            print(code, file=stream, flush=True)
            os._exit(0)
    return request


def become(request: dict) -> None:
    """Make this process what the operating system would have started."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts in the background has it ignored
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, name in ((1, "output"), (2, "errors")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if request["plug"]:
        module, name, *arguments = request["plug"].split(":")
        getattr(importlib.import_module(module), name)(*arguments)
    script = request["words"][0]
    sys.argv = [str(REPOSITORY / script) if script.endswith(".py") else script, *request["words"][1:]]
    if script.endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def main() -> None:
    """Import, serve, and in each forked process become the command."""
    sys.path.insert(0, str(REPOSITORY))
    for name in (*ENTRY_SCRIPTS, *(f"scripts.{tool}" for tool in TOOLS)):
        importlib.import_module(name)
        del sys.modules[name]  # the command runs it anew, as its main module
    importlib.import_module("tests.remembered_costs").remember_costs(Path(sys.argv[2]))
    gc.freeze()  # a collection in a command must not touch, and so copy, what all share
    request = serve(sys.argv[1])
    if request is not None:
        _end(_exit_code(request))


def _exit_code(request: dict) -> int:
    """Run the command; what Python would do with its exception."""
    try:
        become(request)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):  # Python ends by the signal itself then
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def _end(code: int) -> None:
    """End as Python does, but leave the memory to the system: freeing it piece by piece would copy it all first."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
