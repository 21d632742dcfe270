"""The folder of a run: what it is called, who may write into it, and the small files that describe it."""

import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

import numpy
import timm
import torch
import yaml

from common import schema
from common.errors import UserError
from common.readers import Source, read_json
from datasets.listing import has_control_characters
from utils.checkpoint import write_text
from utils.result_files import (
    MetricsLog,
    Row,
    read_failures,
    read_pixel_errors,
    read_results,
    write_failures,
    write_pixel_errors,
    write_results,
)
from utils.run_lock import run_lock
from utils.stored_config import EARLIER_DEFAULTS, read_stored_config

logger = logging.getLogger(__name__)

_FACTS = {  # of env.json, that a later command must share
    "encoder_sha256": "encoder weights of sha256",
    "model_sha256": "model of sha256",
    "processes": "number of processes",
    "penalty_images": "penalty images whose names have the sha256",
}
_ENVIRONMENT = {  # what is read of it
    "items": schema.sequence_of(schema.text),
    "processes": schema.count,
    **dict.fromkeys(("commit", "penalty_images"), schema.optional(schema.text)),
    **dict.fromkeys(("date", "device", "encoder_source", "encoder_sha256", "model_sha256"), schema.text),
}
NOT_A_RUN = ("run.lock", "log.txt", "failures.csv")
_NAMES_WITHIN = {  # of a run folder
    *NOT_A_RUN, "config.yaml", "env.json", "metrics.jsonl", "results.csv", "pixel_errors.csv", "cost.json", "timing.json",
    "report.html", "model.pth", "last.pth", "chosen_files.csv", "quantization.json",
}  # fmt: skip


def run_folder_name(
    save_name: str, dataset: str | None, encoder: str, input_size: int, crop_size: int, flags: Mapping[str, object]
) -> str:
    """`<save_name>_dataset=..._Encoder=..._Resize=..._Crop=...` and `flags`, the paper's naming; None: no data set in it."""
    data = "" if dataset is None else f"_dataset={dataset}"
    further = "".join(f"_{name}={value}" for name, value in flags.items())
    return f"{save_name}{data}_Encoder={encoder}_Resize={input_size}_Crop={crop_size}{further}"


def name_of_a_test(changed: list[str]) -> str:
    """Folder within a run for what was measured otherwise than in its training: `test_<flag>=<value>_...`."""
    return "_".join(["test", *changed])


def is_folder_of_a_test(name: str) -> bool:
    """Whether a name could be one of `name_of_a_test`."""
    return re.match(r"test_\w+=", name) is not None


def check_category_names(items: Iterable[str]) -> None:
    """Raise UserError for a category whose folder within a run folder would be another thing's."""
    for item in items:
        first = item.split("/")[0]
        if first.lower() in _NAMES_WITHIN or is_folder_of_a_test(first.lower()):
            raise UserError(f"category {item!r}: rename its folder, a run folder has a file or folder of that name for itself")


def resolved_paths(paths: list[str] | str | None) -> list[Path]:
    """The folders of `--data_path`, whatever way they were written."""
    return [Path(path).resolve() for path in ([paths] if isinstance(paths, str) else paths or [])]


def _comparable(key: str, value: object) -> object:
    return resolved_paths(value) if key == "data_path" else value


def check_plain_name(value: str, flag: str) -> str:
    """Raise UserError for a name that would leave its folder."""
    if not value or value in (".", "..") or "/" in value or "\\" in value or has_control_characters(value):
        raise UserError(f"{flag} {value!r} must be a plain name without slashes and control characters")
    return value


class RunFolder:
    """Reads and writes one run folder; every file is written atomically or appended line by line."""

    def __init__(self, path: Path):
        self.path = path

    def item_folder(self, item: str) -> Path:
        """Folder of one category."""
        return self.path / item

    def stored_config(self) -> dict | None:
        """As `read_stored_config`, None for a new folder."""
        path = self.path / "config.yaml"
        return read_stored_config(path) if os.path.isfile(path) else None

    def claim(self, config: dict, identity_keys: Iterable[str], facts: dict[str, object], overwrite: bool) -> bool:
        """Check that this configuration may write here; true if the folder holds another run, to be deleted first.

        Args:
            facts: what else must be the same, by its name in `env.json`.

        Raises:
            UserError: it holds a run with another value of an identity key or fact, and `overwrite` is not given or the other
                run is of another stage (a stage never overwrites another).
            ResourceError: it cannot be written.
        """
        stored = self.stored_config()
        if stored is not None:
            stored = {**EARLIER_DEFAULTS, **stored}
        if stored is None and self.path.is_dir() and any(child.name not in NOT_A_RUN for child in self.path.iterdir()):
            raise UserError(f"{str(self.path)!r} exists and is no run folder (no config.yaml); choose another --save_name")
        if stored is not None:
            differences = [
                f"{key} {stored[key]!r} there, {config.get(key)!r} here"
                for key in identity_keys
                if key in stored and _comparable(key, stored[key]) != _comparable(key, config.get(key))
            ]
            environment = self.environment()
            differences += [
                f"{_FACTS[name]} {str(environment[name])[:16]} there, {str(value)[:16]} here"
                for name, value in facts.items()
                if environment.get(name, value) != value
            ]
            if stored.get("clb_stage") != config["clb_stage"]:
                raise UserError(
                    f"{str(self.path)!r} holds stage {stored.get('clb_stage')}, this command trains stage "
                    f"{config['clb_stage']}; a stage never overwrites another: choose another --save_name"
                )
            if differences and not overwrite:
                raise UserError(
                    f"{str(self.path)!r} holds another run: {'; '.join(differences)}; choose another --save_name, or give "
                    "--overwrite to delete that run"
                )
            return bool(differences)
        return False

    def clear(self) -> None:
        """Delete the run but its log."""
        for child in self.path.iterdir():
            if child.name in NOT_A_RUN:
                continue
            shutil.rmtree(child) if child.is_dir() else child.unlink()

    def forget(self, model: str, items: list[str], model_folder: Path) -> None:
        """Delete what an earlier training of a model and every evaluation of its categories left.

        Raises:
            DamagedFile: a table that is to keep the other categories cannot be read; then nothing is deleted.
        """
        # a folder of any other name may be a category's
        tests = [RunFolder(folder) for folder in self.path.iterdir() if is_folder_of_a_test(folder.name) and folder.is_dir()]
        for folder in (self, *tests):
            folder.rows()
            folder.pixel_errors()
        for path in (model_folder / "model.pth", model_folder / "last.pth", self.path / "report.html"):
            path.unlink(missing_ok=True)
        for folder in tests:
            folder.forget(model, items, folder.path)
        rows = self.rows()
        for item in items:
            shutil.rmtree(self.item_folder(item), ignore_errors=True)
            self._note_pixel_error(item, None)
        if rows.keys() & set(items):
            self._write_rows({item: row for item, row in rows.items() if item not in items})
        for name in (model, *items):
            MetricsLog(self.path / "metrics.jsonl", name).truncate(0)

    def lock(self) -> AbstractContextManager[None]:
        """As `run_lock`, for this folder."""
        return run_lock(self.path)

    def write_yaml(self, name: str, content: dict) -> None:
        """Atomic YAML file."""
        write_text(self.path / name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def write_environment(self, source: str, device: torch.device, seed: int, items: list[str], facts: dict) -> None:
        """`env.json`: versions, machine, device, code state, command line, seed, and all categories so far.

        Args:
            source: where the encoder's weights come from.
            facts: what a later command must share, see `claim`.
        """
        known = self.environment().get("items", [])
        content = {
            "command": sys.argv,
            "items": known + [item for item in items if item not in known],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": numpy.__version__,
            "cpu_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "commit": _commit(),
            "seed": seed,
            "device": str(device),
            "encoder_source": source,
            **facts,
        }
        write_text(self.path / "env.json", json.dumps(content, indent=2) + "\n")

    def environment(self) -> dict:
        """Content of `env.json`, empty for a new folder; raises DamagedFile."""
        path = self.path / "env.json"
        if not path.is_file():
            return {}
        source = Source(path, "run folder", "remove that file, or choose another --save_name")
        return source.checked(read_json(source), schema.fields({}, _ENVIRONMENT, unknown=True))

    def rows(self) -> dict[str, Row]:
        """Rows of `results.csv` by category, without the mean."""
        return read_results(self.path / "results.csv")

    def pixel_errors(self) -> dict[str, float]:
        """Categories whose pixel metrics come from bins, with the largest error that they can have."""
        return read_pixel_errors(self.path / "pixel_errors.csv")

    def add_row(self, item: str, row: Row, order: list[str], pixel_error: float | None = None) -> None:
        """Put a finished category into `results.csv`, in the data set's order, and renew the mean.

        `pixel_error`: the largest error of its pixel metrics, if they come from bins.
        """
        self.forget_failures([item])
        self._note_pixel_error(item, pixel_error)
        rows = {**self.rows(), item: row}
        known = [name for name in order if name in rows]
        self._write_rows({name: rows[name] for name in known + [name for name in rows if name not in known]})

    def failures(self) -> dict[str, str]:
        """Categories that could not be trained or evaluated, with the reason."""
        return read_failures(self.path / "failures.csv")

    def forget_failures(self, items: list[str]) -> None:
        """Start anew with these categories."""
        self._write_failures({item: reason for item, reason in self.failures().items() if item not in items})

    def add_failures(self, items: list[str], reason: str) -> None:
        """Mark categories as failed, until they have a row."""
        self._write_failures({**self.failures(), **dict.fromkeys(items, reason)})

    def _write_failures(self, failures: dict[str, str]) -> None:
        path = self.path / "failures.csv"
        if failures:
            write_failures(path, failures)
        else:
            path.unlink(missing_ok=True)

    def _note_pixel_error(self, item: str, error: float | None) -> None:
        errors = {name: value for name, value in self.pixel_errors().items() if name != item}
        errors |= {} if error is None else {item: error}
        path = self.path / "pixel_errors.csv"
        if errors:
            write_pixel_errors(path, errors)
        else:
            path.unlink(missing_ok=True)

    def _write_rows(self, rows: dict[str, Row]) -> None:
        write_results(self.path / "results.csv", rows)


def _commit() -> str | None:
    """Commit of the code, with "+changes" if files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
