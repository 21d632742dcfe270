"""Where caches of images and features go, decided and announced before anything is computed."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from common.errors import ResourceError, UserError
from utils.distributed import on_main, world_size

logger = logging.getLogger(__name__)

_LARGEST_SHARE = 0.5  # of the free disk or memory that "auto" may take
_CONTAINER_FILES = (  # of cgroup version 2 and 1: limit, use, statistics, and the name there of file caches that can be dropped
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def plan_cache(
    counts: Mapping[str, int],
    bytes_per_image: int,
    mode: str,
    folder: Path,
    found: Mapping[str, int] | None = None,
    at_once: Mapping[str, int] | None = None,
    subject: str = "feature",
) -> dict[str, str]:
    """Place (off, ram or disk) of each part of a command's images, announced with its size and how to go without.

    auto: all on disk if they take at most half of the free space, else the training images alone, else those in RAM
    likewise, else off. Parts that were found on disk need no room.

    Args:
        counts: images per part, "train" and "test" or one of them, of all categories of the command.
        found: how many of them are on disk already.
        at_once: how many of them RAM would hold at the same time (default: all).
        subject: "feature" or "image": the cache's name in messages and in its flag.

    Raises:
        ResourceError: disk or ram was asked for and does not suffice.
        UserError: ram was asked for under several processes.
    """
    if mode == "off":
        return dict.fromkeys(counts, "off")
    need = {part: (count - (found or {}).get(part, 0)) * bytes_per_image for part, count in counts.items()}
    resident = {part: count * bytes_per_image for part, count in {**counts, **(at_once or {})}.items()}
    return on_main(lambda: _planned(counts, need, resident, mode, folder, subject))


def size_text(size: float) -> str:
    """Bytes for reading."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is or would be made."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())
    return shutil.disk_usage(existing).free


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that could be taken without swapping, file caches that would be dropped included.

    Of the machine, or what is left of a container's limit if that is less.
    """
    left = (_left_of_limit(*(cgroup / name for name in files), dropped) for *files, dropped in _CONTAINER_FILES)
    return min([_available_on_machine(), *(size for size in left if size is not None)])


def _left_of_limit(limit: Path, use: Path, statistics: Path, dropped: str) -> int | None:
    """None without such a cgroup or limit ("max"); one beyond the machine's memory comes out as a large number."""
    try:
        caches = dict(line.split() for line in statistics.read_text().splitlines())
        return max(0, int(limit.read_text()) - int(use.read_text()) + int(caches[dropped]))
    except (OSError, ValueError, KeyError):
        return None


def _available_on_machine() -> int:
    information = Path("/proc/meminfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if available is None else available


def _planned(
    counts: Mapping[str, int], need: dict[str, int], resident: dict[str, int], mode: str, folder: Path, subject: str
) -> dict[str, str]:
    flag, disk, memory = f"--cache_{subject}s", free_disk(folder), available_memory()
    if mode == "ram" and world_size() > 1:
        raise UserError(f"{flag} ram would hold one copy per process ({world_size()} of them); give disk or off")
    room = {"disk": (sum(need.values()), disk), "ram": (sum(resident.values()), memory)}
    if mode == "auto":
        places = _automatic(need, resident, disk, memory)
    else:
        wanted, free = room[mode]
        if wanted > free:
            where = f"below {str(folder)!r}" if mode == "disk" else "in memory"
            raise ResourceError(
                f"{subject} cache: {size_text(wanted)} needed and {size_text(free)} free {where}; make room, or give {flag} off"
            )
        places = dict.fromkeys(counts, mode)
    _announce(counts, need, resident, places, f"{folder} ({size_text(disk)} free)", f"{size_text(memory)} available", subject)
    return places


def _automatic(need: dict[str, int], resident: dict[str, int], disk: int, memory: int) -> dict[str, str]:
    room = _LARGEST_SHARE * disk
    if sum(need.values()) <= room:
        return dict.fromkeys(need, "disk")
    places = {part: "off" if size else "disk" for part, size in need.items()}
    if places.get("train") == "off":
        if need["train"] <= room:
            places["train"] = "disk"
        elif world_size() == 1 and resident["train"] <= _LARGEST_SHARE * memory:  # test images are seen once: RAM saves nothing
            places["train"] = "ram"
    return places


def _announce(
    counts: Mapping[str, int],
    need: dict[str, int],
    resident: dict[str, int],
    places: dict[str, str],
    folder: str,
    memory: str,
    subject: str,
) -> None:
    for part, place in places.items():
        if place == "off":
            logger.warning(
                "%s cache: %d %s images would take %s, too much for %s and %s of memory; they are computed anew each time",
                subject,
                counts[part],
                part,
                size_text(need[part]),
                folder,
                memory,
            )
    for place, sizes, where in (("disk", need, folder), ("ram", resident, f"memory ({memory})")):
        parts = [part for part in counts if places[part] == place and sizes[part]]
        if parts:
            logger.info(
                "%s cache: %s: %s to be written to %s; --cache_%ss off goes without",
                subject,
                " and ".join(f"{counts[part]} {part} images" for part in parts),
                size_text(sum(sizes[part] for part in parts)),
                where,
                subject,
            )
