"""Kill trainings at random moments, resume them, and compare what they leave with that of an uninterrupted one, bit for bit.

python -m scripts.benchmark_crashes --kills 100
python -m scripts.benchmark_crashes --kills 20 --signal TERM --to group --workers 2
python -m scripts.benchmark_crashes --kills 20 --ranks 2
python -m scripts.benchmark_crashes --kills 20 --system RAAD

A training of a miniature network on images made here, whose files are written slowly so that many kills hit a save. It is
killed and resumed until it is finished, and then begun anew, until there were so many kills. After each one, no process of
the command may be left, and a checkpoint that exists must load; at the end, model.pth, results.csv and scores.csv must be
those of the uninterrupted training. With --ranks 2 one of two processes is killed, and the other one must end by itself.
"""

import argparse
import gc
import importlib
import logging
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from utils.command import run_command
from utils.converters import number
from utils.killed_trainings import PATIENCE, PLACES, SYSTEMS, Command, Training, make_images
from utils.parser import tool_parser
from utils.tables import format_rows
from utils.timing import describe_machine

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What was seen: kills by place, finished trainings, and everything that was not as it should be."""

    kills: Counter = field(default_factory=Counter)
    finished: int = 0
    failures: list[str] = field(default_factory=list)

    def check_stop(self, command: Command, expected: set[int]) -> None:
        """Note what a stopped command did wrong: exit codes, processes that are left, checkpoints that do not load."""
        wrong = [code for code in command.codes.values() if code not in expected]
        if wrong or not command.codes:
            self.failures.append(f"exit codes {[*command.codes.values()]}: {command.training.output()}")
        if orphans := command.orphans():
            self.failures.append(f"processes {orphans} are left")
        self.failures += command.training.damaged()

    def check_end(self, command: Command, reference: dict[str, bytes]) -> None:
        """Note what a finished training has that the uninterrupted one has not."""
        self.finished += 1
        if set(command.codes.values()) != {0}:
            self.failures.append(f"exit codes {[*command.codes.values()]}: {command.training.output()}")
        found = command.training.results()
        self.failures += [
            f"{name} differs from that of the uninterrupted training"
            for name in sorted(reference.keys() | found.keys())
            if reference.get(name) != found.get(name)
        ]
        left = [path.name for path in (command.training.folder / "runs").rglob(".*.tmp")]
        self.failures += [f"{name} is left" for name in left]


def uninterrupted(training: Training) -> tuple[dict[str, bytes], float]:
    """Results of a training that nothing stops, and its seconds; raises RuntimeError if it fails."""
    command, started = training.start(), time.monotonic()
    if not command.wait(PATIENCE) or any(command.codes.values()):
        command.end()
        raise RuntimeError(f"the uninterrupted training fails: {training.output()}")
    return training.results(), time.monotonic() - started


def crash_randomly(arguments: argparse.Namespace, root: Path) -> Outcome:
    """Kill trainings at random moments, `--kills` times in all."""
    draw, outcome = random.Random(arguments.seed), Outcome()  # noqa: S311
    options = {"system": arguments.system, "workers": arguments.workers, "ranks": arguments.ranks}
    reference, seconds = uninterrupted(Training(root / "whole", **options))
    logger.info("the uninterrupted training took %.1f s", seconds)
    kill = signal.Signals[f"SIG{arguments.signal}"]
    stopped = {-signal.SIGKILL} if kill == signal.SIGKILL else {128 + kill}
    if arguments.ranks > 1:
        stopped |= {4, 128 + kill}  # the other process says that it lost its peer, or stops with it
    while outcome.kills.total() < arguments.kills:
        training = Training(root / f"training{outcome.finished}", **options)
        while True:
            command = training.start()
            if outcome.kills.total() < arguments.kills and not command.wait(draw.uniform(0, 1.1 * seconds)):
                place = command.place
                command.send(kill, arguments.to == "group", draw.randrange(arguments.ranks))
                if not command.wait(PATIENCE):
                    outcome.failures.append(f"it does not end: {training.output()}")
                    command.end()
                    continue
                if {*command.codes.values()} != {0}:  # else the signal met a command that had just done all
                    outcome.kills[place] += 1
                    outcome.check_stop(command, stopped)
                    if outcome.kills.total() % 10 == 0:
                        logger.info("%d kills, %d failures", outcome.kills.total(), len(outcome.failures))
                    continue
            elif not command.wait(PATIENCE):
                outcome.failures.append(f"it does not end: {training.output()}")
                command.end()
            outcome.check_end(command, reference)
            break
    return outcome


def benchmark(arguments: argparse.Namespace) -> int:
    """Crash trainings and print the counts; exit code 1 if anything was not as it should be."""
    torch.set_num_threads(1)
    importlib.import_module(SYSTEMS[arguments.system][0])  # once, instead of in every command
    gc.freeze()  # a collection in a command must not touch, and so copy, what all share
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "data")
        outcome = crash_randomly(arguments, Path(folder))
    names = ("system", "signal", "to", "workers", "ranks", "kills", "seed")
    print(f"{describe_machine()[0]}; {datetime.now(UTC).date().isoformat()}")
    print(" ".join(f"--{name} {getattr(arguments, name)}" for name in names))
    rows = [("killed", "times"), *((place, str(outcome.kills[place])) for place in PLACES if outcome.kills[place])]
    print(format_rows(rows))
    print(f"{outcome.kills.total()} kills, {outcome.finished} trainings finished, {len(outcome.failures)} failures")
    for failure in outcome.failures:
        print(f"failure: {failure}")
    return 1 if outcome.failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--kills", type=number(int, 1), default=100)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--to", choices=["process", "group"], default="process", help="whom the signal reaches")
    parser.add_argument("--workers", type=number(int, 0), default=0, help="loader processes of the training")
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=1, help="processes that train together")
    parser.add_argument("--system", choices=list(SYSTEMS), default="INP")
    parser.add_argument("--seed", type=number(int, 0), default=1, help="of the moments")
    return run_command(parser, argv, benchmark)


if __name__ == "__main__":
    sys.exit(main())
