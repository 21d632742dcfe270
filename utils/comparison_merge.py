"""Run folders that hold categories of one run, from several machines, joined."""

from dataclasses import replace

from common.errors import UserError
from utils.run_results import Run, folder_name, parts_of
from utils.settings import IDENTITY_KEYS, PROTOCOL_KEYS


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


def _configuration_differences(one: Run, other: Run) -> list[str]:
    """What keeps two folders from being one run; a model of all categories is another one if the categories are others."""
    keys = [*IDENTITY_KEYS, *PROTOCOL_KEYS, "test_checkpoint"]
    differing = [key for key in keys if one.config.get(key) != other.config.get(key)]
    differing += ["item"] if one.trained_items != other.trained_items else []
    differing += ["processes"] if one.processes != other.processes else []
    if [part.dataset for part in parts_of(one)] != [part.dataset for part in parts_of(other)]:
        differing.append("data_path")
    if one.weights != other.weights:
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
    return replace(
        one,
        folders=(*one.folders, *other.folders),
        environments=(*one.environments, *other.environments),
        rows=rows,
        pixel_errors=one.pixel_errors | other.pixel_errors,
        failures={item: reason for item, reason in (one.failures | other.failures).items() if item not in rows},
        cost=one.cost or other.cost,
        timing=one.timing or other.timing,
    )
