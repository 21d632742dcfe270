"""Files of models that are damaged, hostile or of another network: every command that reads one says so, and nothing else."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.entry_scripts import ALL, INP_SINGLE, RAAD, VARAD, EntryScript, every_entry_script
from tests.miniature import make_mvtec
from tests.model_damages import ATTACK, CONTAINER_DAMAGES, FLIPPED_TENSOR, Damage


@pytest.fixture(scope="module")
def trained(commands, tmp_path_factory):
    """A folder with data and a tiny run of every script, made when a test asks for it; `last.pth` stays beside `model.pth`."""
    root = tmp_path_factory.mktemp("trained")
    data = make_mvtec(root / "data")

    def run_of(script: EntryScript) -> Path:
        if not script.folder(root).exists():
            finished = commands.run(*script.words(root, data), plug="tests.plugs:keep_training_state")
            assert finished.code == 0, finished.err
        return root

    return run_of


@dataclass
class Copy:
    """A script's run, copied to a folder of the test."""

    script: EntryScript
    root: Path
    tmp_path: Path

    @property
    def folder(self) -> Path:
        return self.script.model_folder(self.tmp_path)

    @property
    def model(self) -> Path:
        return self.folder / "model.pth"

    def words(self, *flags: str) -> list[str]:
        return self.script.words(self.tmp_path, self.root / "data", *flags)


@pytest.fixture
def copied(trained, tmp_path):
    """Copy a script's run; results are forgotten, so that --resume goes on."""

    def copy(script: EntryScript) -> Copy:
        root = trained(script)
        shutil.copytree(script.folder(root), script.folder(tmp_path))
        return Copy(script, root, tmp_path)

    return copy


# ways to have a command read a file: the run -> the file and the command


def test_phase(run: Copy) -> tuple[Path, list[str]]:
    return run.model, run.words("--phase", "test")


def resume(run: Copy) -> tuple[Path, list[str]]:
    (run.script.folder(run.tmp_path) / "results.csv").unlink()
    return run.folder / "last.pth", run.words("--resume")


def _next_stage(run: Copy, reference: str) -> list[str]:
    if run.script is RAAD:
        return run.words("--stage", "quantize")
    return run.words("--clb_stage", "1" if run.script is VARAD else "2", "--load_checkpoint", reference)


def start_by_name(run: Copy) -> tuple[Path, list[str]]:
    name = run.script.folder_name.partition("_dataset=")[0].removesuffix("-2")  # a default name gets the number of images
    return run.model, _next_stage(run, name)


def start_by_path(run: Copy) -> tuple[Path, list[str]]:
    file = run.tmp_path / "any name.pth"
    shutil.copyfile(run.model, file)
    return file, _next_stage(run, str(file))


def other_data(run: Copy) -> tuple[Path, list[str]]:
    return run.model, run.words("--phase", "test", "--test_checkpoint", str(run.model))


def packed_export(run: Copy) -> tuple[Path, list[str]]:
    return run.model, ["scripts.export", "--checkpoint", str(run.model), "--output", str(run.tmp_path / "out.binaryad")]


def graph_export(run: Copy) -> tuple[Path, list[str]]:
    return run.model, ["scripts.export", "--checkpoint", str(run.model), "--output", str(run.tmp_path / "out.onnx")]


test_phase.__test__ = False
WAYS = [
    *((script, way) for script in ALL for way in (test_phase, resume, start_by_name)),
    *((script, start_by_path) for script in ALL if script is not RAAD),  # which goes on from runs by name
    *((script, other_data) for script in ALL if script is not RAAD),
    *((script, way) for script in (INP_SINGLE, VARAD, RAAD) for way in (packed_export, graph_export)),
]


def results_below(folder: Path) -> dict[Path, bytes]:
    """Models, results and whatever lies outside of run folders."""
    kinds = {".pth", ".csv", ".binaryad", ".onnx", ".safetensors"}
    return {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in kinds}


@pytest.fixture
def refuses(commands, tmp_path):
    """Write a file, give it to a command, and return the sentence with which that ends; nothing else has happened."""

    def call(file: Path, content: bytes, words: list[str], code: int = 2) -> str:
        file.write_bytes(content)
        before = results_below(tmp_path)
        finished = commands.run(*words)
        assert finished.code == code, finished.err[-1000:]
        assert results_below(tmp_path) == before
        assert not (tmp_path / "marker").exists()
        assert repr(str(file)) in finished.sentence
        return finished.sentence

    return call


@pytest.mark.parametrize(("script", "way"), WAYS, ids=lambda part: getattr(part, "name", None) or part.__name__)
def test_every_command_that_reads_a_checkpoint_refuses_a_changed_one(copied, refuses, tmp_path, script, way):
    """Case 28, and 25 wherever a checkpoint is read."""
    file, words = way(copied(script))
    sentence = refuses(file, FLIPPED_TENSOR.make(file.read_bytes(), tmp_path / "marker"), words)
    assert "damaged" in sentence


@every_entry_script
def test_hostile_pickles_run_nothing(copied, refuses, tmp_path, script):
    """Case 26."""
    file, words = test_phase(copied(script))
    assert "refused" in refuses(file, ATTACK.make(file.read_bytes(), tmp_path / "marker"), words)


@pytest.mark.parametrize("damage", CONTAINER_DAMAGES, ids=str)
def test_every_damage_of_a_checkpoint_has_its_sentence(copied, refuses, tmp_path, damage: Damage):
    """Cases 25 and 26."""
    file, words = test_phase(copied(INP_SINGLE))
    assert damage.said in refuses(file, damage.make(file.read_bytes(), tmp_path / "marker"), words)
