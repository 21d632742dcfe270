"""Broken, strange and hostile data sets: every command that reads images says what is wrong, or reads them right."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import realiad
from tests.broken_files import DAMAGES, damage, in_all_modes
from tests.commands import Finished
from tests.data_readers import CHECK, EVALUATE, TRAININGS, Reader, each, every_reader, one_with_all
from tests.entry_scripts import DINOMALY, INP_FEW, INP_SINGLE, RAAD, VARAD, EntryScript, every_entry_script
from tests.miniature import SIDE, make_mvtec, save, texture
from tests.miniature_layouts import (
    each_tree,
    litter,
    make_realiad,
    realiad_record,
    write_realiad_index,
)

GOOD, TRAIN, DEFECTIVE = Path("bottle/test/good"), Path("bottle/train/good"), Path("bottle/test/hole")
TRUTH = Path("bottle/ground_truth/hole")


@pytest.fixture(scope="session")
def packed(commands, tmp_path_factory) -> Path:
    """A packed model of the tiniest run."""
    folder = tmp_path_factory.mktemp("packed")
    finished = commands.run(*INP_SINGLE.words(folder, make_mvtec(folder / "data")))
    assert finished.code == 0, finished.err
    model, output = INP_SINGLE.model_folder(folder) / "model.pth", folder / "bottle.binaryad"
    finished = commands.run("scripts.export", "--checkpoint", model, "--output", output, "--encoder_reference")
    assert finished.code == 0, finished.err
    return output


@pytest.fixture
def refuses(commands, tmp_path, packed):
    """Run a reader that must end with code 2; returns its sentence."""

    def call(reader: Reader, data: Path, *flags: str, plug: str | None = None) -> str:
        return reader.refusal(commands, tmp_path, data, *flags, model=packed, plug=plug)

    return call


@pytest.fixture
def accepts(commands, tmp_path, packed):
    """Run a reader that must end with code 0."""

    def call(reader: Reader, data: Path, *flags: str) -> Finished:
        finished = reader.run(commands, tmp_path, data, *flags, model=packed)
        assert finished.code == 0, finished.out + finished.err
        return finished

    return call


@pytest.fixture
def predict(commands, tmp_path, packed):
    """Judge images by a real command; returns it and the rows of its table by path."""

    def call(*inputs: Path, flags: tuple[str, ...] = ()) -> tuple[Finished, dict[str, dict]]:
        output = tmp_path / "out"
        finished = commands.run("scripts.predict", "--model", packed, "--output", output, "--input", *inputs, *flags)
        assert "Traceback" not in finished.err
        table = output / "predictions.csv"
        rows = list(csv.DictReader(table.open(newline=""))) if table.is_file() else []
        return finished, {row["path"]: row for row in rows}

    return call


@pytest.fixture
def distil(commands, tmp_path):
    """Distil a teacher from images by a real command."""
    flags = ("--source", "random_vit_tiny_14", "--size", "tiny", "--image_size", "64", "--iterations", "2", "--batch_size", "2")
    flags += ("--num_workers", "0", "--device", "cpu")

    def call(*images: Path) -> Finished:
        return commands.run(
            "scripts.distill_teacher", *flags, "--images", *images, "--output", tmp_path / "teacher.safetensors"
        )

    return call


@every_reader
def test_data_that_is_not_there(refuses, tmp_path, mvtec, reader):  # case 1
    for missing in (tmp_path / "nowhere", "C:\\parts\\nowhere"):
        sentence = refuses(reader, missing)
        assert repr(str(missing)) in sentence
        assert "<item>/train/good/*.png" in sentence
    assert not (tmp_path / "runs").exists()


@every_reader
def test_a_misspelt_category_is_offered_the_nearest(refuses, mvtec, reader):  # case 2
    assert "did you mean 'bottle'?" in refuses(reader, mvtec, "--item", "botle")


@each([*TRAININGS, CHECK])
def test_nothing_to_train_on(refuses, mvtec, reader):  # case 3
    for path in (mvtec / TRAIN).iterdir():
        path.unlink()
    assert f"{str(mvtec / TRAIN)!r} holds no image" in refuses(reader, mvtec)
    (mvtec / TRAIN).rmdir()
    assert f"{str(mvtec / TRAIN)!r} does not exist" in refuses(reader, mvtec)


@every_reader
def test_a_mask_that_is_missing(refuses, accepts, mvtec, reader):  # case 5
    (mvtec / TRUTH / "001_mask.png").unlink()
    sentence = refuses(reader, mvtec)
    assert "1 defective images" in sentence
    assert "'001.png'" in sentence
    if reader in (CHECK, EVALUATE, TRAININGS[0]):
        accepts(reader, mvtec, "--allow_missing_masks")


@every_reader
def test_masks_are_not_paired_by_order(refuses, mvtec, reader):  # case 6
    (mvtec / TRUTH / "001_mask.png").rename(mvtec / TRUTH / "777_mask.png")
    assert "'777_mask.png'" in refuses(reader, mvtec)


@every_reader
def test_a_mask_of_another_size(refuses, mvtec, reader):  # case 7
    mask = save(mvtec / TRUTH / "001_mask.png", np.zeros((64, 48), np.uint8))
    sentence = refuses(reader, mvtec)
    assert f"{str(mask)!r} is 48x64" in sentence
    assert "is 64x64" in sentence


def test_any_mask_value_above_zero_is_defect(accepts, tmp_path, mvtec):  # case 8
    def table(name: str, repaint) -> list[str]:
        data = tmp_path / name
        shutil.copytree(mvtec, data)
        for path in (data / TRUTH).iterdir():
            repaint(np.asarray(Image.open(path)) > 0).save(path)
        return accepts(EVALUATE, data).out.splitlines()[1].split()[1:-2]  # without the file's name, its size and the time

    ramp = np.arange(SIDE * SIDE, dtype=np.uint32).reshape(SIDE, SIDE)
    plain = table("plain", lambda marked: Image.fromarray(marked.astype(np.uint8) * 255))
    assert len(plain) >= 9
    for name, repaint in {
        "values": lambda marked: Image.fromarray((marked * (1 + ramp % 254)).astype(np.uint8)),
        "colour": lambda marked: Image.fromarray(np.stack([marked * 0, marked * 0, marked * 7], axis=2).astype(np.uint8)),
        "palette": lambda marked: Image.fromarray(marked.astype(np.uint8) * 200).convert("P"),
        "16 bits": lambda marked: Image.fromarray((marked * 3).astype(np.uint16)),
        "bits": lambda marked: Image.fromarray(marked),
    }.items():
        assert table(name, repaint) == plain, name


PLACES = {"empty": TRAIN, "cut PNG": GOOD, "cut JPEG": DEFECTIVE, "text": TRUTH, "enormous": TRAIN}


@pytest.mark.parametrize(
    ("reader", "kind"),
    [*one_with_all([CHECK, *TRAININGS], PLACES, ("empty", "cut PNG", "text")), *one_with_all([EVALUATE], PLACES, ())],
)
def test_a_damaged_image_is_named(refuses, mvtec, reader, kind):  # cases 10, 11, 12, 15
    where = GOOD if PLACES[kind] == TRAIN and reader is EVALUATE else PLACES[kind]
    if where == TRUTH:
        save(mvtec / DEFECTIVE / "999.png", texture(np.random.default_rng(0)))
    elif where == DEFECTIVE:
        save(mvtec / TRUTH / "999_mask.png", np.ones((SIDE, SIDE), np.uint8))
    path = damage(mvtec / where, kind)
    sentence = refuses(reader, mvtec)
    assert repr(str(path)) in sentence
    assert DAMAGES[kind][2] in sentence


@every_entry_script
def test_damaged_images_are_left_out_on_demand(commands, tmp_path, mvtec, script):  # case 11
    bad = [damage(mvtec / TRAIN, "cut JPEG"), damage(mvtec / GOOD, "empty"), damage(mvtec / DEFECTIVE, "cut PNG")]
    save(mvtec / TRUTH / "999_mask.png", np.ones((SIDE, SIDE), np.uint8))
    finished = commands.run(*script.words(tmp_path, mvtec, "--skip_bad_images"))
    assert finished.code == 0, finished.err
    assert "3 undecodable images skipped" in finished.err
    folder = script.folder(tmp_path) / "bottle"
    assert [row["path"] for row in csv.DictReader((folder / "bad_images.csv").open())] == list(map(str, bad))
    assert "999" not in (folder / "scores.csv").read_text()


def test_unusable_photographs_do_not_stop_the_judging(predict, tmp_path):  # cases 10, 11, 12, 15
    folder = tmp_path / "photos"
    good = save(folder / "good.png", texture(np.random.default_rng(0)))
    damaged = {damage(folder, kind, kind): DAMAGES[kind][2] for kind in DAMAGES}
    finished, rows = predict(folder)
    assert finished.code == 1
    assert rows.keys() == set(map(str, [good, *damaged]))
    assert rows[str(good)]["verdict"] in ("OK", "NG")
    for path, words in damaged.items():
        assert words in rows[str(path)]["error"], path
        assert not rows[str(path)]["score"]


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_a_teacher_is_not_distilled_from_damaged_images(distil, tmp_path, kind):  # cases 10, 11, 12, 15
    path = damage(save(tmp_path / "photos" / "good.png", texture(np.random.default_rng(0))).parent, kind)
    finished = distil(tmp_path / "photos")
    assert finished.code == 2
    assert repr(str(path)) in finished.sentence
    assert DAMAGES[kind][2] in finished.sentence


def test_a_photograph_is_judged_alike_in_every_mode(predict, tmp_path):  # case 13
    paths = in_all_modes(tmp_path / "photos")
    finished, rows = predict(tmp_path / "photos")
    assert finished.code == 0, finished.err
    scores = {name: float(rows[str(path)]["score"]) for name, path in paths.items()}
    assert scores == dict.fromkeys(paths, scores["RGB"])


def test_images_are_found_whatever_their_suffix(accepts, predict, distil, tmp_path):  # case 14
    data = make_mvtec(tmp_path / "data", train=0)
    names = ["a.jpg", "b.jpeg", "c.JPG", "d.tif", "e.TIFF", "f.bmp", "g.webp", "h.PNG"]
    for name in names:
        save(data / TRAIN / name, texture(np.random.default_rng(0)))
    litter(data / TRAIN)
    assert accepts(CHECK, data).out.splitlines()[1].split()[:2] == ["bottle", "8"]
    assert "bottle: 8 images to train on" in accepts(TRAININGS[0], data).err
    assert predict(data / TRAIN)[1].keys() == {str(data / TRAIN / name) for name in names}
    assert "8 images; features of" in distil(data / TRAIN).err


def test_maps_have_the_size_of_their_photographs(predict, tmp_path):  # case 16
    sizes = {"dot.png": (1, 1), "strip.png": (5000, 20)}
    for name, size in sizes.items():
        save(tmp_path / "photos" / name, np.full((*size, 3), 90, np.uint8))
    finished, _ = predict(tmp_path / "photos", flags=("--maps", "npy"))
    assert finished.code == 0, finished.err
    for name, size in sizes.items():
        assert np.load(tmp_path / "out" / "maps" / f"{name}.npy").shape == size


STRANGE_NAMES = ("line\nbreak.png", "\x1b[31mred.png", "quo'te \" ,.png", "=1+1.png", "ünï cødé 漢字.png", "-rf.png")


def snapshot(folder: Path) -> dict[str, tuple]:
    """Every file and folder with its time and content."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


@every_entry_script
def test_a_strange_data_set_is_read_and_left_alone(commands, tmp_path, script):  # cases 13, 14, 16, 17, 19, 47
    """Names, sizes and modes of every kind, links to files and folders elsewhere, and a folder that stays as it is."""
    elsewhere, data = make_mvtec(tmp_path / "store"), tmp_path / "dätä ' \" =x"
    (data / TRAIN.parent).mkdir(parents=True)
    (data / TRAIN).symlink_to(elsewhere / TRAIN, target_is_directory=True)
    shutil.copytree(elsewhere / TRUTH.parent, data / TRUTH.parent)
    shutil.copytree(elsewhere / DEFECTIVE, data / DEFECTIVE)
    for index, name in enumerate(STRANGE_NAMES):
        save(data / GOOD / name, texture(np.random.default_rng(index)))
    in_all_modes(data / GOOD)
    litter(data / GOOD)
    save(data / GOOD / "dot.png", np.full((1, 1, 3), 90, np.uint8))
    save(data / GOOD / "strip.png", np.full((5000, 20, 3), 90, np.uint8))
    (data / GOOD / "linked.png").symlink_to(elsewhere / TRAIN / "000.png")  # also the same image in training and test
    (tmp_path / "by link").symlink_to(data, target_is_directory=True)
    before = snapshot(data), snapshot(elsewhere)
    given = tmp_path / "by link"
    finished = commands.run(*script.words(tmp_path, given))
    assert finished.code == 0, finished.err
    assert (snapshot(data), snapshot(elsewhere)) == before
    rows = list(csv.DictReader((script.folder(tmp_path) / "bottle" / "scores.csv").open(newline="", encoding="utf-8")))
    names = {Path(row["path"]).name for row in rows}
    assert names >= {*STRANGE_NAMES, "linked.png", "dot.png", "strip.png", "16-bit grey.png", "turned.png"}
    assert not names & {"._000.png", "Thumbs.db", ".DS_Store"}
    twins = [str(given / TRAIN / "000.png"), str(given / GOOD / "linked.png")]
    for text in (finished.err, (script.folder(tmp_path) / "log.txt").read_text()):
        assert "the same image is in train and test: {!r} and {!r}".format(*twins) in text
        assert "\x1b[31mred" not in text
        assert "\nbreak" not in text


@each_tree
def test_an_image_in_training_and_test_is_a_warning(commands, tmp_path, dataset, make, item, kinds):  # case 19
    root = make(tmp_path)
    flags = ("--dataset", dataset, "--data_path", str(root), "--item", item)
    trained, tested = listed_images(root, dataset, item)
    tested.write_bytes(trained.read_bytes())
    finished = commands.run("scripts.check_dataset", *flags)
    assert finished.code == 0, finished.out
    assert f"warning: {item}: the same image is in train and test: {str(trained)!r} and {str(tested)!r}" in finished.out


def listed_images(root: Path, dataset: str, item: str) -> tuple[Path, Path]:
    """An image that is trained on and a good test image of the same type, by what the trees of the tests look like."""
    if dataset == "Real-IAD":
        index = json.loads((root / "realiad_jsons" / "realiad_jsons" / f"{item}.json").read_text())
        return tuple(root / "realiad_1024" / item / index[part][0]["image_path"] for part in ("train", "test"))
    if dataset == "VisA" and (root / "split_csv").is_dir():
        images = root / item / "Data" / "Images" / "Normal"
        return images / "001.JPG", images / "000.JPG"
    (folder,) = root.rglob(f"{item}/train")
    return tuple(sorted((folder.parent / part).glob("*/000.*"))[index] for part, index in (("train", 0), ("test", -1)))


DINOMALY_SINGLE, DINOMALY_FEW = (
    EntryScript("Binary_Dinomaly", (*DINOMALY.flags, "--setting", kind), DINOMALY.folder_name.replace("Multi-Class", name))
    for kind, name in (("single", "Single-Class"), ("few", "Few-Shot-4"))
)
FEW_PER_CATEGORY = EntryScript(
    "Binary_INP_Few_Shot", (*INP_FEW.flags, "--per_category"), INP_FEW.folder_name.replace("-2", "-Per-Category-2")
)


@each([Reader("few", INP_FEW), Reader("Dinomaly", DINOMALY_FEW)])
def test_shots_that_there_are_not(refuses, mvtec, reader):  # case 20
    sentence = refuses(reader, mvtec, "--shot", "9")
    assert "has 8 training images, fewer than --shot 9" in sentence
    for number in ("0", "-1"):
        assert f"{number} is not at least 1" in refuses(reader, mvtec, "--shot", number)


@each(TRAININGS)
def test_sizes_that_do_not_fit(refuses, mvtec, reader):  # case 21
    if reader.script is RAAD:
        assert "use 64 or 96" in refuses(reader, mvtec, "--image_size", "80")
        assert "is not at least 64" in refuses(reader, mvtec, "--image_size", "32")
        return
    assert "use 56 or 70" in refuses(reader, mvtec, "--crop_size", "60")
    assert "larger than --input_size 64; lower the crop to 56" in refuses(reader, mvtec, "--crop_size", "70")


@every_entry_script
def test_a_batch_larger_than_the_set_is_no_empty_epoch(refuses, tmp_path, mvtec, script):  # case 22
    sentence = refuses(Reader(script.name, script), mvtec, "--batch_size", "99")
    assert "--batch_size" in sentence
    assert "or smaller" in sentence
    assert not (tmp_path / "runs").exists()


CONFIGURATIONS = {
    "unknown": ("batch_sise: 4", "did you mean 'batch_size'?"),
    "type": ("seed: many", "'many'"),
    "empty": ("", "is empty"),
    "object": ("seed: !!python/object/apply:os.system ['touch MARKER']", "cannot be read as YAML"),
    "module": ("seed: !!python/module:tests.plugs", "cannot be read as YAML"),
    "list": ("- seed: 1", "is no list of `name: value` lines"),
    "twice": ("seed: 1\nseed: 2", "'seed' is there twice"),
    "alias": ("item: &a [x]\ndata_path: *a", "has an alias"),
    "deep": ("seed: " + "[" * 3000, "nested too deeply"),
    "large": ("# " + "x" * 300_000 + "\nseed: 1", "limit is 200000"),
    "bytes": ("seed: \udcff", "is no UTF-8 text"),
    "digits": ("seed: " + "9" * 5000, "cannot be read as YAML"),
    "date": ("seed: 2001-99-99", "cannot be read as YAML"),
    "flag": ("item: [bottle, --overwrite]", "item has the unusable value"),
    "mapping": ("seed: {a: 1}", "seed has the unusable value"),
}


@pytest.mark.parametrize(("reader", "kind"), one_with_all(TRAININGS, CONFIGURATIONS, ("unknown", "type", "empty", "object")))
def test_settings_in_a_file_that_cannot_be_used(refuses, tmp_path, mvtec, reader, kind):  # case 23
    content, words = CONFIGURATIONS[kind]
    path, marker = tmp_path / "settings.yaml", tmp_path / "marker"
    path.write_text(content.replace("MARKER", str(marker)), errors="surrogateescape")
    sentence = refuses(reader, mvtec, "--config", str(path))
    assert words in sentence
    assert repr(str(path)) in sentence
    assert not marker.exists()


GOOD_RECORD = realiad_record("OK", "OK/S0000/audiojack_0000_OK_C1_20231021.jpg")
HOSTILE_INDICES = {
    "absent": (None, "index not found"),
    "no JSON": ("<html>", "is no JSON"),
    "no list": ("[1]", "no list 'train'"),
    "twice": ('{"train": [], "train": []}', "'train' is there twice"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "no number": ('{"train": [NaN]}', "NaN is no number"),
    "no class": ([{"image_path": GOOD_RECORD["image_path"]}], "has no 'anomaly_class'"),
    "no path": ([{"anomaly_class": "OK"}], "has no 'image_path'"),
    "unknown class": ([{**GOOD_RECORD, "anomaly_class": "XX"}], "unknown anomaly_class 'XX'"),
    "up": ([realiad_record("OK", "../../outside/secret.jpg")], "points outside the data set"),
    "absolute": ([realiad_record("OK", "OUTSIDE/secret.jpg")], "points outside the data set"),
    "link": ([realiad_record("OK", "OK/link.jpg")], "leaves the data set by a symbolic link"),
    "linked folder": ([realiad_record("OK", "folder/secret.jpg")], "leaves the data set by a symbolic link"),
    "zero byte": ([realiad_record("OK", "OK/S0000\0/a.jpg")], "which no file can be called"),
    "half a character": ([realiad_record("OK", "\ud800/a.jpg")], "which no file can be called"),
    "long": ([realiad_record("OK", "x" * 5000)], "1 training images of Real-IAD 'audiojack' are missing"),
}


@pytest.mark.parametrize(("reader", "kind"), one_with_all([CHECK, *TRAININGS], HOSTILE_INDICES, ("absent", "up", "link")))
def test_a_hostile_index_leads_to_no_file_outside(refuses, tmp_path, reader, kind):  # case 18
    root = make_realiad(tmp_path / "data")
    outside = save(tmp_path / "outside" / "secret.jpg", texture(np.random.default_rng(0))).parent
    images, (content, words) = root / "realiad_1024" / "audiojack", HOSTILE_INDICES[kind]
    (images / "OK" / "link.jpg").symlink_to(outside / "secret.jpg")
    (images / "folder").symlink_to(outside, target_is_directory=True)
    path = root / "realiad_jsons" / "realiad_jsons" / "audiojack.json"
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content)
    else:
        text = json.dumps([content[0], *[GOOD_RECORD] * 5]).replace("OUTSIDE", str(outside))
        write_realiad_index(root, "audiojack", json.loads(text), [GOOD_RECORD])
    flags = ("--dataset", "Real-IAD", "--item", "audiojack")
    sentence = refuses(reader, root, *flags, plug=f"tests.plugs:end_when_opened:{outside}")
    assert words in sentence
    assert str(path) in sentence or kind == "long"


def test_links_within_real_iad_and_a_linked_category_are_followed(tmp_path):
    root, elsewhere = make_realiad(tmp_path / "data"), tmp_path / "elsewhere"
    images = root / "realiad_1024" / "audiojack"
    images.rename(elsewhere)
    images.symlink_to(elsewhere, target_is_directory=True)
    stored = root / "store" / "a.jpg"
    stored.parent.mkdir()
    (elsewhere / GOOD_RECORD["image_path"]).rename(stored)
    (elsewhere / GOOD_RECORD["image_path"]).symlink_to(stored)
    write_realiad_index(root, "audiojack", [GOOD_RECORD], [GOOD_RECORD])
    assert [record.path for record in realiad.train_records(root, "audiojack")] == [images / GOOD_RECORD["image_path"]]


@pytest.mark.parametrize(
    "script", [FEW_PER_CATEGORY, DINOMALY_SINGLE, VARAD, RAAD], ids=["few per category", "Dinomaly", "VarAD", "RAAD"]
)
def test_a_category_that_fails_leaves_the_others_complete(commands, tmp_path, script):  # case 42
    data = make_mvtec(tmp_path / "data", items=("bottle", "nut"), train=5)
    broken = data / "bottle" / "train" / "good" / "000.png"
    whole = broken.read_bytes()
    for path in broken.parent.iterdir():
        path.write_bytes(whole[:2000])
    words = script.words(tmp_path, data, "--total_iters", "1")
    finished = commands.run(*words)
    assert finished.code == 1, finished.err
    assert "failed: bottle: " in finished.out
    folder = script.folder(tmp_path)
    assert [row["item"] for row in csv.DictReader((folder / "results.csv").open())] == ["nut", "Mean"]
    (failure,) = csv.DictReader((folder / "failures.csv").open())
    assert failure["item"] == "bottle"
    finished_model = (folder / "nut" / "model.pth").stat().st_mtime_ns
    for path in broken.parent.iterdir():
        path.write_bytes(whole)
    again = commands.run(*words, "--resume")
    assert again.code == 0, again.err
    assert [row["item"] for row in csv.DictReader((folder / "results.csv").open())] == ["bottle", "nut", "Mean"]
    assert (folder / "nut" / "model.pth").stat().st_mtime_ns == finished_model
    assert not (folder / "failures.csv").exists()
