"""Results as run folders hold them: read, joined where categories lie on several machines, and split by data set."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from binarize.cost import Cost
from common.errors import UserError
from datasets.catalog import LAYOUTS
from utils.protocol import EvaluationOptions
from utils.report import read_cost
from utils.result_files import Row
from utils.run_folder import NOT_A_RUN, RunFolder
from utils.settings import IDENTITY_KEYS, PROTOCOL_KEYS

TIMING_FILE = "timing.json"


@dataclass(frozen=True)
class Run:
    """One training with what was measured of it, from one folder or several that share its categories.

    Attributes:
        name: its save_name; a test with another protocol appends the name of its own folder.
        rows: metrics as fractions by category; with several data sets the category carries its data set's name.
        failures: reason by category, of categories that have no row.
        timing: content of `timing.json`, or None.
    """

    name: str
    folders: tuple[Path, ...]
    config: dict
    environment: dict
    rows: dict[str, Row]
    failures: dict[str, str]
    cost: dict[str, Cost] | None
    timing: dict | None

    @property
    def datasets(self) -> list[str]:
        return self.config["dataset"].split("+")

    @property
    def protocol(self) -> str:
        """How its numbers were measured, in one line."""
        return EvaluationOptions.from_config(self.config).describe()

    @property
    def setting(self) -> str:
        """Name of the paper's setting, as in `utils.published`."""
        if self.config.get("test_checkpoint"):
            return "zero-shot"
        kind, shot = self.config.get("setting", "single"), self.config.get("shot")
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
    expected: tuple[str, ...]

    @property
    def missing(self) -> list[str]:
        return [item for item in self.expected if item not in self.rows]


def has_begun(folder: Path) -> bool:
    """Whether there is more than the lock and the log of a training that did not come to its first category."""
    return folder.exists() and not (folder.is_dir() and all(child.name in NOT_A_RUN for child in folder.iterdir()))


def load_run(folder: Path) -> Run:
    """One run folder, finished or not; raises UserError if it is none."""
    config = RunFolder(folder).stored_config()
    if config is None or "clb_stage" not in config:
        raise UserError(f"{str(folder)!r} is no run folder (no config.yaml of a training); give folders that a training wrote")
    training = training_folder(folder)
    suffix = "" if training == folder else f"/{folder.name}"
    try:
        environment = RunFolder(training).environment()
        cost = read_cost(training / "cost.json")
        timing_file = training / TIMING_FILE
        timing = json.loads(timing_file.read_text()) if timing_file.is_file() else None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"run folder damaged: a JSON file in {str(training)!r} is unusable ({error}); remove that file"
        ) from error
    run = RunFolder(folder)
    return Run(config["save_name"] + suffix, (folder,), config, environment, run.rows(), run.failures(), cost, timing)


def training_folder(folder: Path) -> Path:
    """The folder of the training: of a test with another protocol it is the one around it."""
    inside = (folder / "env.json").is_file() or not (folder.parent / "config.yaml").is_file()
    return folder if inside else folder.parent


def merge_runs(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Runs of one name and configuration as one; and warnings about runs of one name that are not the same."""
    merged: list[Run] = []
    warnings = []
    for run in runs:
        same_name = [index for index, other in enumerate(merged) if folder_name(other) == folder_name(run)]
        differences = {index: _configuration_differences(merged[index], run) for index in same_name}
        joined = next((index for index, keys in differences.items() if not keys), None)
        if joined is not None:
            merged[joined] = _joined(merged[joined], run)
            continue
        for index, keys in differences.items():
            if keys != ["seed"]:
                warnings.append(
                    f"{merged[index].folders[0]} and {run.folders[0]} have the same name but differ in {', '.join(keys)}; "
                    "they are shown as separate runs"
                )
        merged.append(run)
    return merged, warnings


def folder_name(run: Run) -> tuple[str, ...]:
    """Name of the run's folder, and for a test with another protocol of its folder inside."""
    folder, training = run.folders[0].resolve(), training_folder(run.folders[0]).resolve()
    return (folder.name,) if folder == training else (training.name, folder.name)


def _configuration_differences(one: Run, other: Run) -> list[str]:
    """What keeps two folders from being one run; a model of all categories is another one if the categories are others."""
    keys = [*IDENTITY_KEYS, *PROTOCOL_KEYS, "test_checkpoint"]
    one_model = one.config.get("setting", "single") != "single" and not one.config.get("per_category")
    keys += ["item"] if one_model else []
    differing = [key for key in keys if one.config.get(key) != other.config.get(key)]
    if [part.dataset for part in parts_of(one)] != [part.dataset for part in parts_of(other)]:
        differing.append("data_path")
    if one.environment.get("encoder_sha256") != other.environment.get("encoder_sha256"):
        differing.append("encoder weights")
    return differing


def _joined(one: Run, other: Run) -> Run:
    """One run with the categories of both; raises UserError if they disagree on a category."""
    for item in one.rows.keys() & other.rows.keys():
        if one.rows[item] != other.rows[item]:
            raise UserError(
                f"{one.folders[0]} and {other.folders[0]} are the same run but have different numbers for {item}; "
                "give only the folder whose numbers are right"
            )
    rows = {**one.rows, **other.rows}
    items = list(dict.fromkeys([*one.environment.get("items", []), *other.environment.get("items", [])]))
    return replace(
        one,
        folders=(*one.folders, *other.folders),
        environment={**one.environment, "items": items} if items else one.environment,
        rows=rows,
        failures={item: reason for item, reason in (one.failures | other.failures).items() if item not in rows},
        cost=one.cost or other.cost,
        timing=one.timing or other.timing,
    )


def parts_of(run: Run) -> list[Part]:
    """A run's results by data set."""
    several = len(run.datasets) > 1
    paths = run.config.get("data_path") or []
    paths = [paths] if isinstance(paths, str) else paths
    parts = []
    for index, dataset in enumerate(run.datasets):
        prefix = f"{dataset}/" if several else ""
        asked = run.environment.get("items") or run.config.get("item") or []
        published = LAYOUTS[dataset].published_items if dataset in LAYOUTS else None
        own = [item.removeprefix(prefix) for item in asked if item.startswith(prefix)]
        rows = {item.removeprefix(prefix): row for item, row in run.rows.items() if item.startswith(prefix)}
        expected = tuple(published or own or rows)
        label = f"{dataset} ({Path(paths[index]).name})" if dataset == "Folder" and index < len(paths) else dataset
        order = [item for item in expected if item in rows] + [item for item in rows if item not in expected]
        parts.append(Part(run, label, {item: rows[item] for item in order}, expected))
    return parts


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
