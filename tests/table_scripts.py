"""Run the shell scripts of the tables with a python that only records how it was called."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.conftest import REPOSITORY

STUB = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["STUB_LOG"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
words = " ".join(sys.argv[1:])
for pattern, code in json.loads(os.environ.get("STUB_CODES", "{{}}")).items():
    if pattern in words:
        sys.exit(code)
"""


def table_runner(folder: Path) -> Callable:
    """A function that runs a script by name and returns (exit code, command lines of its python, process).

    `codes` of it: what a command line holds -> the exit code of that command; the rest is the environment.
    """
    stub, log = folder / "stub", folder / "log"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(name: str, *flags: str, codes: dict | None = None, **environment: str):
        log.write_text("")
        started = subprocess.run(
            ["bash", str(REPOSITORY / "scripts" / f"{name}.sh"), *flags],
            env={
                "PATH": os.environ["PATH"],
                "PYTHON": str(stub),
                "STUB_LOG": str(log),
                "STUB_CODES": json.dumps(codes or {}),
                "SAVE_DIR": "runs",
                **environment,
            },
            capture_output=True,
            text=True,
        )
        return started.returncode, [json.loads(line) for line in log.read_text().splitlines()], started

    return run
