"""Runs side by side: what was asked for and is there, which runs belong together, and how far they are from float."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.readers import DamagedFile
from datasets.catalog import LAYOUTS
from utils.comparison_merge import merge_runs
from utils.comparison_pairs import but_for_seed, float_of, shared_name
from utils.hosts import HOSTS
from utils.metrics import column_names
from utils.published import SETTINGS, Published, PublishedRow
from utils.result_files import Row
from utils.run_results import Part, Run, has_begun, load_run, missing_of, not_begun, parts_of


@dataclass(frozen=True)
class Average:
    """Mean over runs, their sample standard deviation (None for one run) and their number; values are fractions."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed, each with its float run if there is one."""

    parts: tuple[Part, ...]
    floats: tuple[Part | None, ...]

    @property
    def stage(self) -> int:
        return self.parts[0].run.config["clb_stage"]

    @property
    def host(self) -> str:
        return self.parts[0].run.host

    @property
    def metric_size(self) -> int:
        """Side of the maps that it was measured on, in pixels; 0: that of the images."""
        return self.parts[0].run.config["metric_size"]

    @property
    def items(self) -> list[str]:
        """Categories that every run has."""
        return _shared(self.parts)

    @property
    def pairs(self) -> list[tuple[Part, Part]]:
        """(run, its float run) where there is one."""
        return [(part, other) for part, other in zip(self.parts, self.floats, strict=True) if other is not None]

    @property
    def items_with_float(self) -> list[str]:
        """Categories that every run and every float run has."""
        return _shared([part for pair in self.pairs for part in pair])

    @property
    def name(self) -> str:
        """The save name, without the seed if the runs' names differ in nothing else."""
        return shared_name([part.run for part in self.parts])

    @property
    def float_name(self) -> str:
        """The same of the float runs."""
        return shared_name([other.run for _, other in self.pairs])

    def pixel_error(self, items: Iterable[str]) -> float | None:
        """Largest error, as a fraction, of pixel metrics from bins among some categories; None if all are exact."""
        return max(
            (part.pixel_errors[item] for part in self.parts for item in items if item in part.pixel_errors), default=None
        )

    def average(self, metric: str, items: Sequence[str]) -> Average | None:
        """Of the runs' means over some categories."""
        return _average([_mean([part.rows[item].get(metric) for item in items]) for part in self.parts])

    def difference(self, metric: str, items: Sequence[str]) -> Average | None:
        """Of the runs' mean differences to float over some categories that have the metric in both."""
        return _average(
            [_mean([_minus(part.rows[item], other.rows[item], metric) for item in items]) for part, other in self.pairs]
        )


@dataclass(frozen=True)
class Section:
    """All that belongs into one table of the paper: one setting on one data set, ordered by host and stage."""

    setting: str
    dataset: str
    groups: tuple[Group, ...]

    @property
    def parts(self) -> list[Part]:
        return [part for group in self.groups for part in group.parts]

    @property
    def labelled_groups(self) -> list[tuple[str, Group]]:
        """Each row of our results with what it is called: its name, with its host and folder where it takes them to tell.

        The host is named beside runs of another host, unless the name says it; the folder where two have the same name.
        """
        several_hosts = len({group.host for group in self.groups}) > 1
        names = [
            f"{group.name} ({group.host})" if several_hosts and group.host.lower() not in group.name.lower() else group.name
            for group in self.groups
        ]
        labels = [
            name if names.count(name) == 1 else f"{name} [{group.parts[0].run.folders[0]}]"
            for name, group in zip(names, self.groups, strict=True)
        ]
        return list(zip(labels, self.groups, strict=True))

    @property
    def metrics(self) -> list[str]:
        """The seven metrics, then what this data set has beyond them."""
        rows = [row for part in self.parts for row in part.rows.values()]
        return list(column_names(rows))

    @property
    def items(self) -> list[str]:
        """All categories that some run has, in the data set's order."""
        found = dict.fromkeys(item for part in self.parts for item in (*part.expected, *part.rows))
        return [item for item in found if any(item in part.rows for part in self.parts)]

    def published_rows(self, published: Published) -> list[PublishedRow]:
        """What others measured in this setting on maps of a size that some of our runs, of the row's host, were measured on."""
        ours = {(host, group.metric_size) for group in self.groups for host in ("", group.host)}
        return [row for row in published.of(self.setting, self.dataset) if (row.host, row.metric_size) in ours]


@dataclass(frozen=True)
class Comparison:
    """Everything a report shows: its tables, what is missing as sentences, and what a reader must know beforehand."""

    sections: tuple[Section, ...]
    runs: tuple[Run, ...]
    missing: tuple[str, ...]
    warnings: tuple[str, ...]


def compare_runs(folders: Iterable[Path]) -> Comparison:
    """Read run folders, join what belongs together, and pair every run with its float run.

    Raises:
        UserError: a folder is no run folder, two folders contradict each other, or none has a result yet.
    """
    folders = list(dict.fromkeys(folders))
    begun = [folder for folder in folders if has_begun(folder)]
    missing, loaded, damaged = not_begun(folders, begun), [], []
    for folder in begun:
        try:
            loaded.append(load_run(folder))
        except DamagedFile as error:  # says which file, and how to renew it
            damaged.append(error)
    missing += map(str, damaged)
    runs, warnings = merge_runs(loaded)
    missing += [line for run in runs for line in missing_of(run)]
    finished = [run for run in runs if run.rows]
    if not finished and damaged:
        raise damaged[0]
    if not finished:
        raise UserError(f"no results in {' '.join(map(str, folders))}; train at least one category, or correct the run folders")
    protocols = {run.protocol: [other for other in finished if other.protocol == run.protocol] for run in finished}
    if len(protocols) > 1:
        lines = "; ".join(f"{' '.join(run.name for run in runs)}: {protocol}" for protocol, runs in protocols.items())
        warnings.append(f"PROTOCOLS DIFFER, rows of different ones are not comparable: {lines}")
    return Comparison(_sections(finished), tuple(runs), tuple(missing), tuple(warnings))


def _sections(runs: list[Run]) -> tuple[Section, ...]:
    tables: dict[tuple[str, str], list[Part]] = {}
    for run in runs:
        for part in parts_of(run):
            if part.rows:
                tables.setdefault((run.setting, part.dataset), []).append(part)
    settings, datasets = list(SETTINGS), list(LAYOUTS)

    def rank(key: tuple[str, str]) -> tuple:
        known = settings.index(key[0]) if key[0] in settings else len(settings)
        return known, key[0], datasets.index(key[1]) if key[1] in datasets else len(datasets), key[1]

    return tuple(Section(*key, _groups(tables[key])) for key in sorted(tables, key=rank))


def _groups(parts: list[Part]) -> tuple[Group, ...]:
    """Runs that differ only in seed together, in the order of hosts and stages; equal seeds are repetitions, kept apart."""
    groups: list[list[Part]] = []
    for part in parts:
        for group in groups:
            seeds = [other.run.config["seed"] for other in group]
            if but_for_seed(part.run) == but_for_seed(group[0].run) and part.run.config["seed"] not in seeds:
                group.append(part)
                break
        else:
            groups.append([part])
    for group in groups:
        group.sort(key=lambda part: part.run.config["seed"])
    made = [Group(tuple(group), tuple(float_of(part, parts) for part in group)) for group in groups]
    return tuple(sorted(made, key=lambda group: (list(HOSTS).index(group.host), group.stage)))


def _shared(parts: Sequence[Part]) -> list[str]:
    return [item for item in parts[0].rows if all(item in part.rows for part in parts)] if parts else []


def _minus(row: Row, other: Row, metric: str) -> float | None:
    ours, floats = row.get(metric), other.get(metric)
    return None if ours is None or floats is None else ours - floats


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _average(values: Iterable[float | None]) -> Average | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Average(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))
