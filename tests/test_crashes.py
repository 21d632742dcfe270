"""Trainings that are killed and resumed leave the files of an uninterrupted one, and a broken protection is seen."""

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from scripts.benchmark_crashes import Outcome, uninterrupted
from utils import checkpoint, run_lock
from utils.killed_trainings import (
    BEFORE_SAVE,
    BETWEEN,
    EVALUATION,
    LAST,
    MODEL,
    OTHER,
    PATIENCE,
    Moment,
    Training,
    make_images,
)

KILLS = (Moment(BEFORE_SAVE), Moment(LAST, 2), Moment(BETWEEN), Moment(MODEL), Moment(EVALUATION))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Results of an uninterrupted training."""
    root = tmp_path_factory.mktemp("crashes")
    make_images(root / "data")
    results, _ = uninterrupted(Training(root / "whole"))
    assert [Path(name).name for name in results] == ["model.pth", "scores.csv", "results.csv"]
    return root, results


@pytest.fixture(autouse=True)
def one_thread():
    """As the commands that are forked from here: they cannot share the threads of this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def crash_at(moments: Sequence[Moment], training: Training, reference: dict[str, bytes]) -> Outcome:
    """Let a training kill itself at one moment after the other, resuming it each time, and then let it finish."""
    outcome = Outcome()
    for moment in moments:
        command = training.start(moment)
        if not command.wait(PATIENCE):
            command.end()
        outcome.kills[moment.place] += 1
        outcome.check_stop(command, {-signal.SIGKILL})
    command = training.start()
    if not command.wait(PATIENCE):
        command.end()
    outcome.check_end(command, reference)
    return outcome


def test_kills_at_distinct_places_change_nothing(reference):
    root, results = reference
    outcome = crash_at(KILLS, Training(root / "killed"), results)
    assert outcome.failures == []
    assert dict(outcome.kills) == {moment.place: 1 for moment in KILLS}
    assert outcome.finished == 1


def write_in_place() -> None:
    """A save that is no longer atomic."""

    def atomic_write(path, write) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            write(file)

    checkpoint.atomic_write = atomic_write


def forget_moments() -> None:
    """A resumed optimizer that begins anew."""
    torch.optim.Optimizer.load_state_dict = lambda self, state: None


def leave_temporary_files() -> None:
    """Nothing tidies up after a killed process."""
    run_lock._remove_unfinished = lambda folder: None


@pytest.mark.parametrize(
    ("broken", "moment", "failure"),
    [
        (write_in_place, Moment(LAST, 2), "checkpoint damaged"),
        (forget_moments, Moment(BETWEEN, 1), "model.pth differs"),
        (leave_temporary_files, Moment(OTHER, 1), "tmp is left"),
    ],
)
def test_broken_protection_is_seen(reference, broken, moment, failure):
    root, results = reference
    outcome = crash_at([moment], Training(root / broken.__name__, prepare=broken), results)
    assert any(failure in found for found in outcome.failures), outcome.failures
