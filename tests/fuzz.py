"""Read mutants of all kinds of files as the program does, and print what became of them.

python -m tests.fuzz --mutants 1000 --seed 0
python -m tests.fuzz --reader "model.pth INP-Former" --only 17 --keep mutants/
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts threads, which a fork does not have

from tests.fuzz_engine import FINE, Limits, Summary, Workspace, fuzz, mutant
from tests.fuzz_readers import READERS
from utils.tables import format_rows

HEAD = ("reader", "mutants", *FINE, "failures", "seconds")


def run(names: Sequence[str], count: int, seed: int, seconds: float | None, only: int | None = None) -> list[Summary]:
    """Fuzz some readers one after the other; what is known of each is told to stderr as it comes."""
    summaries = []
    for name in names:
        until = None if seconds is None else time.monotonic() + seconds
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            start, number = (0, count) if only is None else (only, 1)
            summary = fuzz(READERS[name], Path(folder), number, seed, Limits(), start, until)
        summaries.append(summary)
        print("  ".join(summary.row()), summary.describe(), sep="\n" if summary.failures else "", file=sys.stderr, flush=True)
    return summaries


def closing_line(summaries: Sequence[Summary]) -> str:
    """All readers in a sentence."""
    mutants, failures = (sum(map(len, (getattr(one, name) for one in summaries))) for name in ("verdicts", "failures"))
    seconds = sum(summary.seconds for summary in summaries)
    return f"{mutants} mutants of {len(summaries)} readers in {seconds:.0f} s: {failures} failures"


def keep(name: str, seed: int, index: int, folder: Path) -> None:
    """Write a mutant into a folder, with the valid file beside it."""
    with tempfile.TemporaryDirectory() as work:
        space = Workspace(READERS[name], Path(work))
        mutation, content = mutant(READERS[name], space.source, seed, index)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"valid-{space.target.name}").write_bytes(space.source.content)
    (folder / f"{index}-{mutation.name}-{space.target.name}").write_bytes(content)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if any mutant failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=1000, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--reader", nargs="+", choices=list(READERS), default=list(READERS), metavar="NAME", help="default: all"
    )
    parser.add_argument("--seconds", type=float, help="start no further mutants of a reader after that many seconds")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this mutant alone, with its traceback")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="with --only: write the mutant there")
    parser.add_argument("--list", action="store_true", help="print the names of all readers")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(READERS))
        return 0
    summaries = run(arguments.reader, arguments.mutants, arguments.seed, arguments.seconds, arguments.only)
    if arguments.only is not None:
        for name, summary in zip(arguments.reader, summaries, strict=True):
            for verdict in summary.verdicts:
                print(f"{name}, {verdict.mutation}: {verdict.outcome}; {verdict.detail}\n{verdict.trace}")
            if arguments.keep:
                keep(name, arguments.seed, arguments.only, arguments.keep)
    print(format_rows([HEAD, *(summary.row() for summary in summaries)]))
    print(closing_line(summaries))
    return 1 if any(summary.failures for summary in summaries) else 0


if __name__ == "__main__":
    sys.exit(main())
