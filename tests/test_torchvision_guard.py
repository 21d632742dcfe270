"""A torchvision that was built for CUDA beside a torch for the CPU (case 41), played by a package of that name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

BUILT_FOR_CUDA = """
import torch
if not hasattr(torch.ops.torchvision, "nms"):
    raise RuntimeError("operator torchvision::nms does not exist")
"""
BROKEN_OTHERWISE = "raise RuntimeError('no such file')"


@pytest.mark.parametrize(("content", "works"), [(BUILT_FOR_CUDA, True), (BROKEN_OTHERWISE, False)])
def test_a_build_for_cuda_is_imported_and_another_fault_is_not_hidden(tmp_path: Path, content: str, works: bool):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(content)
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])

    def python(lines: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", lines], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )

    assert python("import torchvision").returncode == 1
    guarded = python("from common.torchvision_guard import ensure_torchvision\nensure_torchvision()\nimport torchvision")
    assert (guarded.returncode == 0) == works, guarded.stderr
    assert works or "no such file" in guarded.stderr
