"""Where caches go: every case of the plan, with the numbers that a user is told."""

import logging
from pathlib import Path

import pytest

import utils.cache_plan
from common.errors import ResourceError, UserError
from utils.cache_plan import plan_cache

COUNTS = {"train": 100, "test": 300}
MEGABYTE = 1_000_000


@pytest.fixture
def room(monkeypatch):
    """Set the free megabytes of disk and memory."""

    def set_room(disk: int, memory: int) -> None:
        monkeypatch.setattr(utils.cache_plan, "free_disk", lambda folder: disk * MEGABYTE)
        monkeypatch.setattr(utils.cache_plan, "available_memory", lambda: memory * MEGABYTE)

    return set_room


def plan(mode, tmp_path, counts=COUNTS, **options):
    return plan_cache(counts, MEGABYTE, mode, tmp_path, **options)


@pytest.mark.parametrize(
    ("disk", "memory", "train", "test"),
    [
        (800, 0, "disk", "disk"),  # 400 MB of features are half of the disk
        (799, 0, "disk", "off"),
        (200, 0, "disk", "off"),
        (199, 200, "ram", "off"),
        (199, 199, "off", "off"),
    ],
)
def test_auto_takes_at_most_half_of_disk_and_memory(room, tmp_path, disk, memory, train, test):
    room(disk, memory)
    assert plan("auto", tmp_path) == {"train": train, "test": test}


def test_auto_counts_what_is_found_as_paid(room, tmp_path):
    room(600, 0)
    assert plan("auto", tmp_path, found={"train": 100}) == {"train": "disk", "test": "disk"}
    room(100, 1000)
    assert plan("auto", tmp_path, found={"train": 100, "test": 200}) == {"train": "disk", "test": "off"}
    assert plan("auto", tmp_path, found={"test": 300}) == {"train": "ram", "test": "disk"}


def test_memory_holds_one_category_at_a_time(room, tmp_path):
    room(0, 50)
    assert plan("auto", tmp_path, at_once={"train": 25})["train"] == "ram"
    assert plan("auto", tmp_path, at_once={"train": 26})["train"] == "off"
    assert plan("ram", tmp_path, at_once={"train": 20, "test": 30}) == {"train": "ram", "test": "ram"}
    with pytest.raises(ResourceError, match=r"51\.0 MB needed and 50\.0 MB free in memory"):
        plan("ram", tmp_path, at_once={"train": 21, "test": 30})


def test_test_images_alone_never_go_to_memory(room, tmp_path):
    room(600, 10_000)
    assert plan("auto", tmp_path, {"test": 300}) == {"test": "disk"}
    room(599, 10_000)
    assert plan("auto", tmp_path, {"test": 300}) == {"test": "off"}


def test_a_place_that_was_asked_for_must_suffice(room, tmp_path):
    room(400, 400)
    assert plan("disk", tmp_path) == {"train": "disk", "test": "disk"}
    assert plan("ram", tmp_path) == {"train": "ram", "test": "ram"}
    room(399, 399)
    with pytest.raises(ResourceError, match=r"400\.0 MB needed and 399\.0 MB free below .*--cache_features off"):
        plan("disk", tmp_path)
    with pytest.raises(ResourceError, match=r"400\.0 MB needed and 399\.0 MB free in memory"):
        plan("ram", tmp_path)
    with pytest.raises(ResourceError, match=r"image cache: .*--cache_images off"):
        plan("disk", tmp_path, subject="image")
    assert plan("disk", tmp_path, found={"test": 1}) == {"train": "disk", "test": "disk"}


def test_off_needs_and_says_nothing(room, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    room(0, 0)
    assert plan("off", tmp_path) == {"train": "off", "test": "off"}
    assert not caplog.text


def test_several_processes_share_a_file_but_no_memory(room, tmp_path, monkeypatch):
    room(100, 10_000)
    monkeypatch.setattr(utils.cache_plan, "world_size", lambda: 4)
    assert plan("auto", tmp_path) == {"train": "off", "test": "off"}
    with pytest.raises(UserError, match=r"one copy per process.*disk or off"):
        plan("ram", tmp_path)


def test_sizes_are_announced_with_the_way_out(room, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    room(2000, 0)
    plan("auto", tmp_path, found={"test": 100})
    (line,) = caplog.messages
    assert line == (
        f"feature cache: 100 train images and 300 test images: 300.0 MB to be written to {tmp_path} (2.0 GB free); "
        "--cache_features off goes without"
    )
    caplog.clear()
    room(300, 0)
    plan("auto", tmp_path)
    left_out, taken = caplog.messages
    assert "300 test images would take 300.0 MB, too much for" in left_out
    assert "100 train images: 100.0 MB" in taken


def test_room_is_measured_on_this_machine(tmp_path):
    assert utils.cache_plan.free_disk(tmp_path / "not" / "yet") > 0
    assert utils.cache_plan.available_memory() > 10 * MEGABYTE


V1 = "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"
V2 = "memory.max", "memory.current", "memory.stat", "inactive_file"


def container(folder: Path, files: tuple[str, ...], limit: object) -> Path:
    """Memory files of a container that uses 30 MB, 20 MB of them file caches that can be dropped."""
    *names, dropped = files
    statistics = f"cache 1\n{dropped} {20 * MEGABYTE}\nunevictable 0\n"
    for name, content in zip(names, (f"{limit}\n", f"{30 * MEGABYTE}\n", statistics), strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(utils.cache_plan, "_available_on_machine", lambda: 500 * MEGABYTE)


@pytest.mark.parametrize("files", [V1, V2])
@pytest.mark.parametrize(
    ("limit", "expected"), [(100 * MEGABYTE, 90), (5 * MEGABYTE, 0), (9223372036854771712, 500), ("max", 500)]
)
def test_memory_of_a_container_ends_at_its_limit(machine, tmp_path, files, limit, expected):
    assert utils.cache_plan.available_memory(container(tmp_path, files, limit)) == expected * MEGABYTE


def test_the_tighter_of_two_limits_counts(machine, tmp_path):
    container(tmp_path, V1, 200 * MEGABYTE)
    assert utils.cache_plan.available_memory(container(tmp_path, V2, 100 * MEGABYTE)) == 90 * MEGABYTE


@pytest.mark.parametrize("missing", V2[:3])
def test_without_a_containers_files_the_machine_counts(machine, tmp_path, missing):
    assert utils.cache_plan.available_memory(tmp_path) == 500 * MEGABYTE
    container(tmp_path, V2, 100 * MEGABYTE)
    (tmp_path / missing).unlink()
    assert utils.cache_plan.available_memory(tmp_path) == 500 * MEGABYTE
