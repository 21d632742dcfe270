"""Every command that reads a data set with its masks, for tests of what each must refuse or read right."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import Commands, Finished
from tests.entry_scripts import ALL, EntryScript


@dataclass(frozen=True)
class Reader:
    """A training script or a tool."""

    name: str
    script: EntryScript | None = None

    def run(
        self,
        commands: Commands,
        tmp_path: Path,
        data: Path,
        *flags: str,
        model: Path | None = None,
        plug: str | None = None,
    ) -> Finished:
        """Run it on a `Folder`, or on what the flags say; `model`: packed, for a tool that needs one."""
        if self.script:
            return commands.run(*self.script.words(tmp_path, data, *flags), plug=plug)
        models = ("--model", model) if self is EVALUATE else ()
        return commands.run(self.name, *models, "--dataset", "Folder", "--data_path", data, *flags, plug=plug)

    def refusal(self, commands: Commands, tmp_path: Path, data: Path, *flags: str, **options) -> str:
        """What is wrong with the data: `run` must end with code 2 and say it, and nothing else."""
        finished = self.run(commands, tmp_path, data, *flags, **options)
        assert finished.code == 2, finished.out + finished.err
        if self is not CHECK:
            return finished.sentence
        assert "Traceback" not in finished.err
        lines = [line for line in (finished.out + finished.err).splitlines() if line.startswith("error: ")]
        assert lines
        return "\n".join(lines)


TRAININGS = [Reader(script.name, script) for script in ALL]
CHECK, EVALUATE = Reader("scripts.check_dataset"), Reader("scripts.evaluate")


def each(readers: list[Reader]) -> pytest.MarkDecorator:
    """Parametrise a test over readers."""
    return pytest.mark.parametrize("reader", readers, ids=lambda reader: reader.name)


every_reader = each([*TRAININGS, CHECK, EVALUATE])


def one_with_all(readers: list[Reader], kinds: Iterable[str], some: Iterable[str]) -> list:
    """(reader, kind): the first reader with all, the others with some: how a file is read does not depend on the script."""
    first, *others = readers
    pairs = [(first, kind) for kind in kinds] + [(reader, kind) for reader in others for kind in some]
    return [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in pairs]
