"""The folder of a run: what it is called, who may write into it, and the small files that describe it."""

import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy
import timm
import torch
import yaml

from common.errors import ResourceError, UserError
from models.encoder import FrozenEncoder
from utils.checkpoint import write_text
from utils.distributed import world_size
from utils.result_files import MetricsLog, Row, read_failures, read_results, write_failures, write_results

logger = logging.getLogger(__name__)

NOT_A_RUN = ("run.lock", "log.txt", "failures.csv")


def run_folder_name(
    save_name: str, dataset: str | None, encoder: str, input_size: int, crop_size: int, prototype_count: int
) -> str:
    """`<save_name>_dataset=..._Encoder=..._Resize=..._Crop=..._INP_num=...`, the papers' naming; None: no data set in it."""
    data = "" if dataset is None else f"_dataset={dataset}"
    return f"{save_name}{data}_Encoder={encoder}_Resize={input_size}_Crop={crop_size}_INP_num={prototype_count}"


def check_plain_name(value: str, flag: str) -> str:
    """Raise UserError for a name that would leave its folder."""
    if not value or value in (".", "..") or "/" in value or "\\" in value or "\0" in value:
        raise UserError(f"{flag} {value!r} must be a plain name without slashes")
    return value


class RunFolder:
    """Reads and writes one run folder; every file is written atomically or appended line by line."""

    def __init__(self, path: Path):
        self.path = path

    def item_folder(self, item: str) -> Path:
        """Folder of one category."""
        return self.path / item

    def stored_config(self) -> dict | None:
        """Configuration of the run that made the folder, or None for a new folder."""
        path = self.path / "config.yaml"
        if not path.is_file():
            return None
        try:
            stored = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise UserError(
                f"run folder damaged: {str(path)!r} is no YAML; remove the folder or choose another --save_name"
            ) from error
        if not isinstance(stored, dict):
            raise UserError(
                f"run folder damaged: {str(path)!r} holds no settings; remove the folder or choose another --save_name"
            )
        return stored

    def claim(self, config: dict, identity_keys: Iterable[str], encoder_sha256: str, overwrite: bool) -> bool:
        """Check that this configuration may write here; true if the folder holds another run, to be deleted first.

        Raises:
            UserError: it holds a run with another value of an identity key, and `overwrite` is not given or the other
                run has another CLB stage (a stage never overwrites another).
            ResourceError: it cannot be written.
        """
        stored = self.stored_config()
        if stored is None and self.path.is_dir() and any(child.name not in NOT_A_RUN for child in self.path.iterdir()):
            raise UserError(f"{str(self.path)!r} exists and is no run folder (no config.yaml); choose another --save_name")
        if stored is not None:
            differences = [
                f"{key} {stored[key]!r} there, {config[key]!r} here"
                for key in identity_keys
                if key in stored and stored[key] != config[key]
            ]
            earlier = self.environment().get("encoder_sha256", encoder_sha256)
            if earlier != encoder_sha256:
                differences.append(f"encoder weights of sha256 {earlier[:16]} there, {encoder_sha256[:16]} here")
            if stored.get("clb_stage") != config["clb_stage"]:
                raise UserError(
                    f"{str(self.path)!r} holds CLB stage {stored.get('clb_stage')}, this command trains stage "
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
        """Delete what an earlier training of a model and the evaluation of its categories left."""
        for name in ("model.pth", "last.pth"):
            (model_folder / name).unlink(missing_ok=True)
        rows = self.rows()
        for item in items:
            shutil.rmtree(self.item_folder(item), ignore_errors=True)
        if rows.keys() & set(items):
            self._write_rows({item: row for item, row in rows.items() if item not in items})
        for name in (model, *items):
            MetricsLog(self.path / "metrics.jsonl", name).truncate(0)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against a second process; a lock whose process is gone on this machine is taken over.

        Raises:
            ResourceError: another process holds it, or the folder cannot be written.
        """
        path = self.path / "run.lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _remove_stale_lock(path)
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError as error:
            if not self.path.is_dir():
                raise ResourceError(
                    f"cannot use {str(self.path)!r} as run folder: it is a file; choose another --save_dir"
                ) from error
            raise ResourceError(
                f"{str(self.path)!r} is in use by {path.read_text().strip() or 'another process'}; wait for it, or remove "
                f"{path.name} if no such process runs"
            ) from error
        except OSError as error:
            raise ResourceError(
                f"cannot write into {str(self.path)!r}: {error.strerror or error}; choose another --save_dir"
            ) from error
        with os.fdopen(descriptor, "w") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def write_yaml(self, name: str, content: dict) -> None:
        """Atomic YAML file."""
        write_text(self.path / name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def write_environment(self, encoder: FrozenEncoder, device: torch.device, seed: int, items: list[str]) -> None:
        """`env.json`: versions, machine, device, code state, command line, encoder, seed, and all categories so far."""
        known = self.environment().get("items", [])
        content = {
            "command": sys.argv,
            "items": known + [item for item in items if item not in known],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "processes": world_size(),
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
            "encoder_source": encoder.source,
            "encoder_sha256": encoder.weights_sha256,
        }
        write_text(self.path / "env.json", json.dumps(content, indent=2) + "\n")

    def environment(self) -> dict:
        """Content of `env.json`, empty for a new folder."""
        path = self.path / "env.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def rows(self) -> dict[str, Row]:
        """Rows of `results.csv` by category, without the mean."""
        return read_results(self.path / "results.csv")

    def add_row(self, item: str, row: Row, order: list[str]) -> None:
        """Put a finished category into `results.csv`, in the data set's order, and renew the mean."""
        self.forget_failures([item])
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

    def _write_rows(self, rows: dict[str, Row]) -> None:
        write_results(self.path / "results.csv", rows)


def _remove_stale_lock(path: Path) -> None:
    """Remove a lock whose process no longer runs on this machine."""
    try:
        _, process, _, host = path.read_text().split()
    except (OSError, ValueError):
        return
    if host != socket.gethostname():
        return
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        logger.warning("took over the lock of process %s, which is gone", process)
        path.unlink(missing_ok=True)
    except PermissionError:
        return


def _commit() -> str | None:
    """Commit of the code, with "+changes" if files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
