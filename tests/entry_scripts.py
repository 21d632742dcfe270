"""Every training script with the flags of its tiniest run, for what all of them must do."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.miniature import TINY_FLAGS


@dataclass(frozen=True)
class EntryScript:
    """A training script.

    Attributes:
        name: without `.py`. flags: of a tiny run. folder_name: what its run folder is called with these flags.
        model_of_all: one model for all categories, so that `model.pth` lies in the run folder itself.
    """

    name: str
    flags: tuple[str, ...]
    folder_name: str
    model_of_all: bool = False

    def words(self, tmp_path: Path, data: Path, *flags: str) -> list[str]:
        """Its command line: training data below `data`, outputs below tmp_path/runs."""
        where = ["--dataset", "Folder", "--data_path", str(data), "--save_dir", str(tmp_path / "runs")]
        return [f"{self.name}.py", *self.flags, *where, *flags]

    def folder(self, tmp_path: Path) -> Path:
        """The run folder of `words` without further flags."""
        return tmp_path / "runs" / self.folder_name

    def model_folder(self, tmp_path: Path, item: str = "bottle") -> Path:
        """Where its `model.pth` and `last.pth` lie."""
        return self.folder(tmp_path) if self.model_of_all else self.folder(tmp_path) / item


_TINY = (*TINY_FLAGS, "--total_iters", "4")
_INP_END = "_dataset=Folder_Encoder=random_vit_tiny_14_Resize=64_Crop=56_INP_num=6"
_END = "_dataset=Folder_Encoder=random_vit_tiny_14_Resize=64_Crop=56"
_RAAD = (
    *("--encoder", "pdn_tiny", "--teacher_weights", "random", "--image_size", "64", "--batch_size", "2", "--holdout", "0.4"),
    *("--total_iters", "4", "--stage", "baseline", "--num_workers", "0", "--device", "cpu"),
)
INP_SINGLE = EntryScript("Binary_INP_Single_Class", _TINY, f"INP-Former-Single-Class{_INP_END}")
INP_MULTI = EntryScript("Binary_INP_Multi_Class", _TINY, f"INP-Former-Multi-Class{_INP_END}", model_of_all=True)
INP_FEW = EntryScript("Binary_INP_Few_Shot", (*_TINY, "--shot", "2"), f"INP-Former-Few-Shot-2{_INP_END}", model_of_all=True)
DINOMALY = EntryScript("Binary_Dinomaly", _TINY, f"Dinomaly-Multi-Class{_END}", model_of_all=True)
VARAD = EntryScript("VarAD", (*_TINY, "--m", "1"), f"VarAD-Single-Class{_END}")
RAAD = EntryScript("RAAD", _RAAD, "RAAD-Single-Class-Baseline_dataset=Folder_Encoder=pdn_tiny_Resize=64_Crop=64")
ALL = (INP_SINGLE, INP_MULTI, INP_FEW, DINOMALY, VARAD, RAAD)

every_entry_script = pytest.mark.parametrize("script", ALL, ids=lambda script: script.name)
