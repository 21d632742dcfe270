"""Results as run folders hold them: read, split by data set, and what is missing of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from binarize.cost import Cost
from common import schema
from common.errors import UserError
from common.readers import Source, read_json
from datasets.catalog import LAYOUTS
from utils.hosts import described_network
from utils.protocol import EvaluationOptions
from utils.report import read_cost
from utils.result_files import Row
from utils.run_folder import NOT_A_RUN, RunFolder
from utils.stored_config import completed_config

TIMING_FILE = "timing.json"


@dataclass(frozen=True)
class Run:
    """One training with what was measured of it, from one folder or several that share its categories.

    Attributes:
        name: its save_name; a test with another protocol appends the name of its own folder.
        config: content of `config.yaml`, with the defaults of flags that are newer than it.
        environments: content of each folder's `env.json`.
        rows: metrics as fractions by category; with several data sets the category carries its data set's name.
        pixel_errors: largest error by category, as a fraction, of those whose pixel metrics come from bins.
        failures: reason by category, of categories that have no row.
        timing: content of `timing.json`, or None.
    """

    name: str
    folders: tuple[Path, ...]
    config: dict
    environments: tuple[dict, ...]
    rows: dict[str, Row]
    pixel_errors: dict[str, float]
    failures: dict[str, str]
    cost: dict[str, Cost] | None
    timing: dict | None

    @property
    def datasets(self) -> list[str]:
        return self.config["dataset"].split("+")

    @property
    def host(self) -> str:
        """Name of the host network."""
        return self.config["host"]

    @property
    def network(self) -> str:
        """See `described_network`."""
        return described_network(self.config)

    @property
    def items(self) -> list[str]:
        """Categories that were asked for in any of its folders."""
        asked = dict.fromkeys(item for environment in self.environments for item in environment.get("items", []))
        return list(asked) or self.config.get("item") or []

    @property
    def weights(self) -> str | None:
        """Hash of the encoder's weights."""
        return self.environments[0].get("encoder_sha256")

    @property
    def processes(self) -> int:
        """How many trained it together, each with batches of its own."""
        return self.environments[0].get("processes", 1)

    @property
    def training_data(self) -> dict:
        """What its training saw in a step and, if all categories share a model, altogether; a zero-shot test does not know."""
        if self.config.get("test_checkpoint"):
            return {}
        return {"batch": self.config["batch_size"] * self.processes, "item": self.trained_items}

    @property
    def trained_items(self) -> list[str] | None:
        """Categories that one model was trained on, None for all of them or a model for each."""
        one_model = self.config["setting"] == "multi" or (
            self.config["setting"] == "few" and not self.config.get("per_category")
        )
        return sorted(self.config["item"]) if one_model and self.config.get("item") else None

    @property
    def protocol(self) -> str:
        """How its numbers were measured, in one line."""
        return EvaluationOptions.from_config(self.config).describe()

    @property
    def setting(self) -> str:
        """Name of the paper's setting, as in `utils.published`."""
        if self.config.get("test_checkpoint"):
            return "zero-shot"
        kind, shot = self.config["setting"], self.config.get("shot")
        if kind == "few":
            return f"few-shot {shot} per category" if self.config.get("per_category") else f"few-shot {shot}"
        return ("super-" if kind == "multi" and len(self.datasets) > 1 else "") + f"{kind}-class"


@dataclass(frozen=True)
class Part:
    """The results of a run on one of its data sets; categories without the data set's name.

    Attributes:
        dataset: its name in tables; a `Folder` is told from another by the name of its root.
        expected: all categories that the table should have.
    """

    run: Run
    dataset: str
    rows: dict[str, Row]
    pixel_errors: dict[str, float]
    expected: tuple[str, ...]

    @property
    def missing(self) -> list[str]:
        return [item for item in self.expected if item not in self.rows]


def has_begun(folder: Path) -> bool:
    """Whether there is more than the lock and the log of a training that did not come to its first category."""
    return folder.exists() and not (folder.is_dir() and all(child.name in NOT_A_RUN for child in folder.iterdir()))


def load_run(folder: Path) -> Run:
    """One run folder, finished or not; raises UserError if it is none."""
    run = RunFolder(folder)
    stored = run.stored_config()
    missing = [name for name in ("clb_stage", "save_name", "dataset") if name not in (stored or {})]
    if missing:
        raise UserError(
            f"{str(folder)!r} is no run folder (no config.yaml of a training that says its {missing[0]}); give folders that a "
            "training wrote"
        )
    training = training_folder(folder)
    suffix = "" if training == folder else f"/{folder.name}"
    return Run(
        name=stored["save_name"] + suffix,
        folders=(folder,),
        config=completed_config(stored),
        environments=(RunFolder(training).environment(),),
        rows=run.rows(),
        pixel_errors=run.pixel_errors(),
        failures=run.failures(),
        cost=read_cost(training / "cost.json"),
        timing=_timing(training / TIMING_FILE),
    )


def _timing(path: Path) -> dict | None:
    """What `utils.run_timing` wrote, or None; raises DamagedFile for anything else."""
    if not path.is_file():
        return None
    source = Source(path, "timing", "remove it and run scripts.report --measure")
    machine = schema.sequence_of(schema.text)
    checks = {"milliseconds": schema.real(0, 1e300), "engine": schema.text, "machine": machine, "date": schema.text}
    return source.checked(read_json(source), schema.fields(checks, unknown=True))


def training_folder(folder: Path) -> Path:
    """The folder of the training: of a test with another protocol it is the one around it."""
    inside = (folder / "env.json").is_file() or not (folder.parent / "config.yaml").is_file()
    return folder if inside else folder.parent


def folder_name(run: Run) -> tuple[str, ...]:
    """Name of the run's folder, and for a test with another protocol of its folder inside."""
    folder, training = run.folders[0].resolve(), training_folder(run.folders[0]).resolve()
    return (folder.name,) if folder == training else (training.name, folder.name)


def parts_of(run: Run) -> list[Part]:
    """A run's results by data set."""
    several = len(run.datasets) > 1
    paths = run.config.get("data_path") or []
    paths = [paths] if isinstance(paths, str) else paths
    parts = []
    for index, dataset in enumerate(run.datasets):
        prefix = f"{dataset}/" if several else ""
        published = LAYOUTS[dataset].published_items if dataset in LAYOUTS else None
        own = [item.removeprefix(prefix) for item in run.items if item.startswith(prefix)]
        rows = {item.removeprefix(prefix): row for item, row in run.rows.items() if item.startswith(prefix)}
        errors = {item.removeprefix(prefix): error for item, error in run.pixel_errors.items() if item.startswith(prefix)}
        expected = tuple(published or own or rows)
        label = f"{dataset} ({Path(paths[index]).name})" if dataset == "Folder" and index < len(paths) else dataset
        order = [item for item in expected if item in rows] + [item for item in rows if item not in expected]
        parts.append(Part(run, label, {item: rows[item] for item in order}, errors, expected))
    return parts


def not_begun(folders: Sequence[Path], begun: Sequence[Path]) -> list[str]:
    """A sentence for each folder in which nothing is trained yet, or one for all of a data set that is left out."""
    by_dataset: dict[str | None, list[Path]] = {}
    for folder in folders:
        named = re.search("_dataset=(.+)_Encoder=", folder.name)
        by_dataset.setdefault(named and named[1], []).append(folder)
    lines = []
    for dataset, same in by_dataset.items():
        if dataset is None or any(folder in begun for folder in same):
            lines += [f"{folder}: nothing is trained yet" for folder in same if folder not in begun]
        else:
            where = same[0] if len(same) == 1 else f"any of {len(same)} run folders"
            lines.append(f"{dataset}: nothing is trained yet in {where}")
    return lines


def missing_of(run: Run) -> list[str]:
    """A sentence for each data set on which a run is not finished."""
    where = ", ".join(map(str, run.folders))
    lines = []
    for part in parts_of(run):
        if not part.rows:
            lines.append(f"{where} on {part.dataset}: no results yet, missing {' '.join(part.missing) or 'all categories'}")
        elif part.missing:
            done = f"{len(part.expected) - len(part.missing)} of {len(part.expected)} categories"
            lines.append(f"{where} on {part.dataset}: {done}, missing {' '.join(part.missing)}")
    return lines + [f"{where}: {item} failed: {reason}" for item, reason in run.failures.items()]
