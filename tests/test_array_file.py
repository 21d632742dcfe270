"""Array files: complete or absent, whatever interrupts their making, and the same however many processes make them."""

import os
import textwrap
from pathlib import Path

import numpy as np
import pytest

import utils.array_file
from common.errors import ResourceError
from tests.commands import joint_errors
from utils.array_file import ArrayFile, _own_part, open_array

ROWS = np.arange(11 * 6, dtype=np.float32).reshape(11, 2, 3)
SCRIPT = """
    import sys, time
    from pathlib import Path
    import numpy as np
    import torch
    from common.errors import CommandError
    from datasets.mvtec import train_records
    from datasets.records import ImageDataset
    from models.build import build_encoder, build_inp_former
    from utils.array_file import ArrayFile
    from utils.distributed import joined, process_group, rank, world_size
    from utils.feature_cache import cache_features
    from utils.image_cache import cache_images

    images = ImageDataset(train_records(Path(sys.argv[1]), "bottle"), 64, 56)
    folder = Path(sys.argv[2])
    with process_group():
        torch.manual_seed(0)
        detector = build_inp_former(build_encoder("random_vit_tiny_14", 56), 6)
        images = cache_images(images, "disk", folder / "images", 0, "test")
        cache_features(images, detector.encode, {}, "disk", folder / "features", 3, 0, "test")

        produced = 0

        def blocks(part):
            global produced
            for index in part:
                if index == 100:
                    raise ValueError("row 100 is bad")
                time.sleep(0.05 * (world_size() - 1))
                produced += 1
                yield np.zeros((1, 2), np.float32)

        try:
            ArrayFile(folder / "bad" / "rows.npy", 200, (2,), np.float32, "feature", "off").make(blocks, 2)
        except (ValueError, CommandError) as error:
            still_in_step = joined([f"process {rank()}"])
            (folder / f"error_{rank()}.txt").write_text(f"{type(error).__name__}: {error}")
            (folder / f"produced_{rank()}.txt").write_text(str(produced))
            assert len(still_in_step) == world_size()
"""


def array_file(folder: Path) -> ArrayFile:
    return ArrayFile(folder / "rows.npy", 11, (2, 3), np.float32, "feature", "ram or off")


def blocks_of_four(part: range):
    for start in range(part.start, part.stop, 4):
        yield ROWS[start : min(start + 4, part.stop)]


def test_file_holds_the_rows_and_is_read_only(tmp_path):
    file = array_file(tmp_path / "new")
    file.make(blocks_of_four, 4)
    assert (np.load(file.path) == ROWS).all()
    array = open_array(file.path, 11, np.float32, "feature")
    assert len(array) == 11
    assert (array[10] == ROWS[10]).all()
    assert not array.rows.flags.writeable
    assert file.bytes == ROWS.nbytes
    assert [path.name for path in file.path.parent.iterdir()] == ["rows.npy"]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_parts_are_whole_blocks_that_cover_every_row_once(processes, monkeypatch):
    monkeypatch.setattr("utils.array_file.world_size", lambda: processes)
    rows = []
    for number in range(processes):
        monkeypatch.setattr("utils.array_file.rank", lambda number=number: number)
        part = _own_part(11, 4)
        assert part.start % 4 == 0 or not part
        rows += part
    assert rows == list(range(11))


def test_every_changed_byte_is_noticed(tmp_path):
    file = array_file(tmp_path)
    file.make(blocks_of_four, 4)
    content = file.path.read_bytes()
    for position in range(len(content)):
        changed = file.path.with_name(f"{position}.npy")
        changed.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert open_array(changed, 11, np.float32, "feature") is None
    assert open_array(file.path, 11, np.float32, "feature") is not None


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:50], lambda data: b"", lambda data: b"x" * 400])
def test_damaged_file_is_not_opened(tmp_path, damage, caplog):
    file = array_file(tmp_path)
    file.make(blocks_of_four, 4)
    file.path.write_bytes(damage(file.path.read_bytes()))
    assert open_array(file.path, 11, np.float32, "feature") is None
    assert "feature cache" in caplog.text


def test_file_of_another_count_or_type_is_not_opened(tmp_path):
    array_file(tmp_path).make(blocks_of_four, 4)
    assert open_array(tmp_path / "rows.npy", 12, np.float32, "feature") is None
    assert open_array(tmp_path / "rows.npy", 11, np.float16, "feature") is None
    assert open_array(tmp_path / "absent.npy", 11, np.float32, "feature") is None


def test_too_few_rows_are_no_complete_file(tmp_path):
    with pytest.raises(RuntimeError, match="were not filled"):
        array_file(tmp_path).make(lambda part: (ROWS[start : start + 4] for start in (0, 4)), 4)
    assert not list(tmp_path.iterdir())


def test_process_that_begins_after_another_has_failed_leaves_the_verdict_to_it(tmp_path, monkeypatch):
    file = array_file(tmp_path)
    start = ArrayFile._start

    def start_and_fail(self):  # what a failing process does to the file of all
        temporary = start(self)
        temporary.unlink()
        return temporary

    monkeypatch.setattr(ArrayFile, "_start", start_and_fail)
    monkeypatch.setattr(utils.array_file, "mean_over_processes", lambda flag: flag / 2)  # of this and the failed one
    with pytest.raises(utils.array_file.PeerLost):
        file.make(blocks_of_four, 4)
    monkeypatch.setattr(utils.array_file, "mean_over_processes", lambda flag: flag)
    with pytest.raises(ResourceError, match="cannot write"):  # nobody failed: the file was taken away
        file.make(blocks_of_four, 4)
    assert not list(tmp_path.iterdir())


def test_killed_process_leaves_no_complete_looking_file_and_the_next_one_tidies_up(commands, tmp_path, caplog):
    folder, script = tmp_path / "folder", tmp_path / "make.py"
    folder.mkdir()
    code = f"""
        import os, signal
        from pathlib import Path
        from tests.test_array_file import array_file, blocks_of_four

        def blocks(part):
            for number, block in enumerate(blocks_of_four(part)):
                if number == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield block

        array_file(Path({str(folder)!r})).make(blocks, 4)
    """
    script.write_text(textwrap.dedent(code))
    assert commands.run(str(script)).code == -9
    (left,) = folder.iterdir()
    assert left.name.endswith(".tmp")
    running = left.with_name(left.name.replace(left.suffixes[-2], f".{os.getppid()}"))
    running.write_bytes(b"another process is at it")
    array_file(folder).make(blocks_of_four, 4)
    assert sorted(folder.iterdir()) == sorted([running, folder / "rows.npy"])
    assert f"removed {left}" in caplog.text


def test_two_processes_make_the_same_files_and_none_waits_for_a_failed_one(commands, tmp_path, mvtec):
    script = tmp_path / "make.py"
    script.write_text(textwrap.dedent(SCRIPT))
    content, errors = {}, {}
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        words = (str(script), str(mvtec), str(folder))
        joint_errors([commands.start(*words)] if name == "one" else commands.start_two(*words))
        content[name] = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.npy")}
        errors[name] = [path.read_text() for path in sorted(folder.glob("error_*.txt"))]
        assert not list((folder / "bad").iterdir())
    assert len(content["one"]) == 2
    assert content["one"] == content["two"]
    assert errors["one"] == ["ValueError: row 100 is bad"]
    assert int((tmp_path / "two" / "produced_0.txt").read_text()) < 50  # of 100: it stops when the other has failed
    first, second = errors["two"]
    assert first.startswith("PeerLost: another process of this command ended")
    assert second == "ValueError: row 100 is bad"
