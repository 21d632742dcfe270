"""Files of models that are damaged, hostile or of another network: every command that reads one says so, and nothing else."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.entry_scripts import ALL, INP_SINGLE, RAAD, VARAD, EntryScript, every_entry_script
from tests.miniature import make_mvtec
from tests.model_damages import ATTACK, CONTAINER_DAMAGES, FLIPPED_TENSOR, Damage, flipped, positions, saved
from tests.test_packed import rewritten
from utils.checkpoint import load_checkpoint, save_checkpoint


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


def phase_test(run: Copy) -> tuple[Path, list[str]]:
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


phase_test.__test__ = False
WAYS = [
    *((script, way) for script in ALL for way in (phase_test, resume, start_by_name)),
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
    file, words = phase_test(copied(script))
    assert "refused" in refuses(file, ATTACK.make(file.read_bytes(), tmp_path / "marker"), words)


@pytest.mark.parametrize("damage", CONTAINER_DAMAGES, ids=str)
def test_every_damage_of_a_checkpoint_has_its_sentence(copied, refuses, tmp_path, damage: Damage):
    """Cases 25 and 26."""
    file, words = phase_test(copied(INP_SINGLE))
    assert damage.said in refuses(file, damage.make(file.read_bytes(), tmp_path / "marker"), words)


def resaved(file: Path, change: Callable[[dict], None]) -> bytes:
    """A checkpoint with another content and the right hashes."""
    content = load_checkpoint(file)
    change(content)
    save_checkpoint(file, content)
    return file.read_bytes()


def put(path: str, value: object) -> Callable[[dict], None]:
    """Change one entry, named by its keys; a number is an index or a parameter."""

    def change(content: dict) -> None:
        *parents, key = (int(part) if part.isdecimal() else part for part in path.split("/"))
        for parent in parents:
            content = content[parent]
        content[key] = value

    return change


def drop(key: str) -> Callable[[dict], None]:
    return lambda content: content.pop(key)


NOT_A_NUMBER = torch.full((6, 32), float("nan"))
UNUSABLE_STATES = [
    (drop("optimizer"), "'optimizer' is missing"),
    (put("iteration", 10**9), "is at iteration 1000000000 of 4"),
    (put("iteration", "4"), "iteration should be an integer"),
    (put("stage", 7), "stage should be 0 or 1 or 2"),
    (put("optimizer/param_groups/0/eps", 1.0), "eps should be 1e-10, found 1.0"),
    (
        put("optimizer/state/0/first_moment", torch.zeros(3)),
        "first_moment has shape (3,) and torch.float32 for",
    ),
    (put("model/prototype_token", NOT_A_NUMBER), "values that are not finite in ['prototype_token']"),
    (put("model/prototype_token", torch.zeros(7, 32)), "prototype_token has (7, 32) instead of (6, 32)"),
    (put("model/prototype_token", torch.zeros(6, 32, dtype=torch.float16)), "prototype_token has torch.float16 instead of"),
]


@pytest.mark.parametrize(("change", "said"), UNUSABLE_STATES, ids=[said for _, said in UNUSABLE_STATES])
def test_a_training_state_that_cannot_be_gone_on_from(copied, refuses, change, said):
    """Of a file that nobody damaged: it was written so, by another version or with bad intent."""
    file, words = resume(copied(INP_SINGLE))
    assert said in refuses(file, resaved(file, change), words)


UNUSABLE_MODELS = [
    (drop("host"), "'host' is missing"),
    (put("host", "PatchCore"), "holds a 'PatchCore'"),
    (put("encoder", "../../etc"), "encoder should be"),
    (put("config/crop_size", 10**7), "config.crop_size should be an integer from 1 to 8192, found 10000000"),
    (put("config/INP_num", 10**9), "config.INP_num should be what --INP_num takes, found 1000000000"),
    (put("calibration/map_limit", float("nan")), "calibration.map_limit should be a finite number, found nan"),
    (put("calibration/scores", [0.1, float("inf")]), "calibration.scores[1] should be a finite number, found inf"),
    (put("protocol/smoothing_kernel", 10**5), "protocol.smoothing_kernel should be an integer from 0 to 1023"),
]


@pytest.mark.parametrize(("change", "said"), UNUSABLE_MODELS, ids=[said for _, said in UNUSABLE_MODELS])
def test_a_model_that_cannot_be_exported(copied, refuses, change, said):
    file, words = packed_export(copied(INP_SINGLE))
    assert said in refuses(file, resaved(file, change), words)


def test_the_data_set_of_a_checkpoint_is_no_path(copied, refuses, tmp_path):
    """It becomes part of the name of the folder where a test on other data puts its results."""
    file, words = other_data(copied(INP_SINGLE))
    assert "'/../../outside' is no data set" in refuses(file, resaved(file, put("config/dataset", "/../../outside")), words)


@every_entry_script
def test_prefixes_of_wrappers_are_stripped_and_other_names_listed(copied, commands, refuses, script):
    """Case 27."""
    run = copied(script)
    file, words = phase_test(run)
    (scores,) = script.folder(run.tmp_path).glob("*/scores.csv")
    before = scores.read_bytes()
    content = load_checkpoint(file)
    wrapped = {f"_orig_mod.module.{name}": value for name, value in content["model"].items()}
    save_checkpoint(file, {**content, "model": wrapped})
    finished = commands.run(*words)
    assert finished.code == 0, finished.err[-1000:]
    assert scores.read_bytes() == before
    first, *_ = content["model"]
    others = {f"{name}s" if name == first else name: value for name, value in wrapped.items()} | {"more": torch.zeros(1)}
    others.pop(f"_orig_mod.module.{first}")
    sentence = refuses(file, resaved(file, lambda found: found.update(model=others)), words)
    assert f"1 tensors are missing ({first})" in sentence
    assert "1 tensors are surplus (more)" in sentence


def test_files_are_not_opened_with_a_torch_that_runs_them(copied, commands):
    finished = commands.run(*phase_test(copied(INP_SINGLE))[1], plug="tests.plugs:old_torch")
    assert finished.code == 2
    assert "torch 2.5.1 can be made to run code" in finished.sentence


OTHER_NETWORKS = {
    "RAAD": ("--padding", "padding: expected True, found False"),
    "VarAD": ("--m=2", "m: expected 2.0, found 1.0"),
    "Binary_Dinomaly": ("--groups=1", "groups: expected 1, found 2"),
}


@every_entry_script
def test_a_stage_starts_from_the_stage_before_of_the_same_model(copied, commands, script):
    """Case 24: without a model, with one of another network, with one of another stage."""
    run = copied(script)
    words = (start_by_name if script is RAAD else start_by_path)(run)[1]
    flag, said = OTHER_NETWORKS.get(script.name, ("--INP_num=4", "INP_num: expected 4, found 6"))
    finished = commands.run(*words, flag)
    assert (finished.code, said in finished.sentence) == (2, True), finished.err[-1000:]
    absent = commands.run(
        *words, "--save_dir", str(run.tmp_path / "empty"), *([] if script is RAAD else ["--load_checkpoint=x"])
    )
    assert (absent.code, "no model for " in absent.sentence) == (2, True), absent.err[-1000:]
    if script is not RAAD and script is not VARAD:
        bare = commands.run(*run.words("--clb_stage", "2"))
        assert (bare.code, "give --load_checkpoint NAME" in bare.sentence) == (2, True), bare.err[-1000:]
        wrong = commands.run(*words, "--clb_stage", "1")
        said = "needs a model of CLB stage 0" in wrong.sentence and "is of CLB stage 1" in wrong.sentence
        assert (wrong.code, said) == (2, True), wrong.err[-1000:]


# packed files


@pytest.fixture(scope="module")
def packed(trained, commands) -> bytes:
    """The packed file of a tiny run."""
    root = trained(INP_SINGLE)
    output = root / "bottle.binaryad"
    model = INP_SINGLE.model_folder(root) / "model.pth"
    finished = commands.run("scripts.export", "--checkpoint", str(model), "--output", str(output))
    assert finished.code == 0, finished.err[-1000:]
    return output.read_bytes()


def predict(file: Path, data: Path) -> list[str]:
    return ["scripts.predict", "--model", str(file), "--input", str(data), "--output", str(file.parent / "out")]


def evaluate(file: Path, data: Path) -> list[str]:
    return ["scripts.evaluate", "--model", str(file), "--dataset", "Folder", "--data_path", str(data)]


def benchmark(file: Path, data: Path) -> list[str]:
    return ["scripts.benchmark", "--model", str(file), "--repeats", "1"]


def described(path: str, value: object) -> Callable[[bytes], bytes]:
    """Another description with the right hash."""
    return lambda content: rewritten(content, lambda header, entry: put(path, value)(entry))


def swollen(content: bytes) -> bytes:
    """A compressed tensor that says it has a billion numbers."""

    def change(header: dict, entry: dict) -> None:
        entry["compressed"][next(iter(entry["compressed"]))]["shape"] = [10**9]

    return rewritten(content, change)


PACKED_DAMAGES = {
    "empty": (lambda content: b"", "is empty"),
    "web page": (lambda content: b"<!DOCTYPE html><html>404</html>" * 9, "is no BinaryAD file"),
    "checkpoint": (lambda content: saved({"weight": torch.ones(9)}), "training checkpoint"),
    "cut in the header": (lambda content: content[:500], "cut short"),
    "cut at the end": (lambda content: content[:-1], "cut short"),
    "enormous header": (lambda content: (2**40).to_bytes(8, "little") + content[8:], "the header"),
    "deep header": (lambda content: (90_000).to_bytes(8, "little") + b'{"a":' + b"[" * 89_995, "is no BinaryAD file"),
    "swollen": (swollen, "would become"),
    "threshold": (described("decision/threshold", float("nan")), "decision.threshold should be a finite number, found nan"),
    "limit": (described("calibration/map_limit", float("inf")), "calibration.map_limit should be a finite number, found inf"),
    "source": (described("decision/source", "\x1b[31m"), "decision.source should be a line of text"),
    "sizes": (described("preprocessing/input_size", 10**9), "preprocessing.input_size should be an integer from 1 to 8192"),
    "kernel": (described("protocol/smoothing_kernel", 4), "protocol.smoothing_kernel should be odd or 0, found 4"),
    "prototypes": (described("config/INP_num", 10**9), "config.INP_num should be what --INP_num takes"),
    "surplus": (described("command", "rm"), "'command' is unknown"),
}


@pytest.mark.parametrize("damage", PACKED_DAMAGES)
def test_every_damage_of_a_packed_file_has_its_sentence(trained, packed, refuses, tmp_path, damage):
    """Cases 25 and 28; `tests.test_packed` flips every bit of a small file."""
    make, said = PACKED_DAMAGES[damage]
    file = tmp_path / "bottle.binaryad"
    assert said in refuses(file, make(packed), predict(file, trained(INP_SINGLE) / "data"))


@pytest.mark.parametrize("command", [predict, evaluate, benchmark])
def test_every_command_that_reads_a_packed_file_refuses_a_changed_one(trained, packed, refuses, tmp_path, command):
    """Case 28."""
    file, content = tmp_path / "bottle.binaryad", packed
    for position in positions(content, 3):
        sentence = refuses(file, flipped(content, position), command(file, trained(INP_SINGLE) / "data"))
        assert "damaged" in sentence


def test_a_graph_of_a_float_model_comes_with_its_hash_and_is_not_read(trained, commands, tmp_path):
    """Cases 28 and 45; `tests.test_onnx` compares the maps of every kind of model."""
    pytest.importorskip("onnxruntime")
    root, file = trained(RAAD), tmp_path / "bottle.onnx"
    export = ["scripts.export", "--checkpoint", str(RAAD.model_folder(root) / "model.pth"), "--teacher_weights", "random"]
    finished = commands.run(*export, "--output", str(file))
    assert finished.code == 0, finished.err[-1000:]
    hashed = (tmp_path / "bottle.onnx.sha256").read_text()
    assert hashed == f"{hashlib.sha256(file.read_bytes()).hexdigest()}  bottle.onnx\n"
    for words in (predict(file, root / "data"), evaluate(file, root / "data"), benchmark(file, root / "data")):
        finished = commands.run(*words)
        assert (finished.code, "is for other runtimes" in finished.sentence) == (2, True)
    finished = commands.run(*export, "--output", str(tmp_path / "bottle.binaryad"))
    assert (finished.code, "nothing to pack" in finished.sentence) == (2, True)
