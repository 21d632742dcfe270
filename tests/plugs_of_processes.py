"""Faults of machines and processes that are put into a command before it begins (see `tests.commands`, `plug`)."""

import atexit
import ctypes
import errno
import fcntl
import multiprocessing.synchronize
import os
import pty
import shutil
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

import quantize.reconstruction
import utils.command
import utils.loading
import utils.training
from datasets.records import ImageDataset
from models.dinomaly import Dinomaly
from models.efficientad import EfficientAD
from models.inp_former import INPFormer
from models.varad import VarAD

DETECTORS = (INPFormer, Dinomaly, VarAD, EfficientAD)


def bug() -> None:
    """An error that nobody thought of, with a message of several lines."""

    def log_to_terminal(quiet: bool) -> None:
        raise TypeError("a bug\n  of two lines")

    utils.command.log_to_terminal = log_to_terminal


def refused(number: str, *path: str) -> None:
    """The system refuses something in a place where nobody expects that."""

    def log_to_terminal(quiet: bool) -> None:
        raise OSError(int(number), os.strerror(int(number)), *path)

    utils.command.log_to_terminal = log_to_terminal


def reader_gone(descriptor: str) -> None:
    """The process that reads a standard stream has ended, as `| head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, int(descriptor))
    os.close(writing)


def stream_full(descriptor: str) -> None:
    """A standard stream goes into a file on a full disk."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, int(descriptor))
    os.close(full)


def streams_closed() -> None:
    """Started with `>&- 2>&-`: Python has no stdout and no stderr then."""
    os.close(1)
    os.close(2)
    sys.stdout = sys.__stdout__ = sys.stderr = sys.__stderr__ = None


def terminal(columns: str) -> None:
    """Standard error is a terminal of that width, whose clock goes an hour back whenever it is read."""
    file = os.dup(2)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, int(columns), 0, 0))
    screen = os.fork()
    if not screen:
        os.close(slave)
        os.dup2(file, 2)
        while text := _read(master):
            os.write(file, text)
        os._exit(0)
    os.close(master)
    os.dup2(slave, 2)
    os.close(slave)
    now = iter(range(2_000_000_000, 0, -3600))
    time.time = lambda: float(next(now))
    sys.modules["tqdm.std"].time = time.time

    def close() -> None:
        sys.stderr.flush()
        os.dup2(file, 2)
        os.waitpid(screen, 0)

    atexit.register(close)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # all processes that had the terminal open are gone
        return b""


def loader_dies(folder: str, end: str) -> None:
    """A loader process that reads an image below a folder ends: by exit code or by a signal's name."""
    original = ImageDataset.image

    def image(self, index: int) -> torch.Tensor:
        if get_worker_info() is not None and f"/{folder}/" in str(self.records[index].path):
            if end.isdecimal():
                os._exit(int(end))
            os.kill(os.getpid(), signal.Signals[end])
        return original(self, index)

    ImageDataset.image = image


def _wrap(name: str, change: Callable) -> None:
    """Put `change(original, self, *arguments)` in the place of a method of every detector."""
    for detector in DETECTORS:
        original = getattr(detector, name)
        setattr(detector, name, lambda *arguments, original=original: change(original, *arguments))


def no_device_memory(work: str) -> None:
    """The device has room for one image in an evaluation, and for none in a training."""
    method = {"training": "training_loss", "evaluation": "anomaly_map"}[work]

    def limited(original: Callable, self, inputs):
        if len(inputs) > (work == "evaluation"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a capacity of 1.00 GiB")
        return original(self, inputs)

    _wrap(method, limited)


def no_memory() -> None:
    """The processor's memory does not suffice for a training step."""

    def training_loss(original: Callable, self, inputs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: 12")

    _wrap("training_loss", training_loss)


def loss_not_finite(iteration: str) -> None:
    """The loss of that iteration, counted from 0, is NaN."""
    iterations = iter(range(1_000_000))

    def training_loss(original: Callable, self, inputs):
        loss, parts = original(self, inputs)
        return (loss * float("nan") if next(iterations) == int(iteration) else loss), parts

    _wrap("training_loss", training_loss)


def two_gpus() -> None:
    """The machine claims to have two GPUs."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2


def signal_in(work: str, number: str, name: str, target: str, calls: str = "1") -> None:
    """A signal arrives in call `number` of some work and in the calls after it, `calls` in all.

    Args:
        work: training, evaluation, saving, quantization, or loading and unloading: the beginning of a loader process and the
            end of all of them.
        name: of the signal. target: process or group.
    """
    counter = iter(range(1, 1_000_000))

    def announce() -> None:
        if int(number) <= next(counter) < int(number) + int(calls):
            if target == "group":
                os.killpg(os.getpgrp(), signal.Signals[name])
            else:
                os.kill(os.getpid(), signal.Signals[name])

    def around(original: Callable, *arguments, **options):
        announce()
        return original(*arguments, **options)

    if work == "evaluation":
        _wrap("anomaly_map", around)
        return
    module, function = {
        "training": (utils.training, "_backward"),
        "saving": (torch, "save"),
        "loading": (utils.loading, "_outlast_signals"),
        "unloading": (multiprocessing.synchronize.Event, "set"),
        "quantization": (quantize.reconstruction, "_minimise"),
    }[work]
    original = getattr(module, function)
    setattr(module, function, lambda *arguments, **options: around(original, *arguments, **options))


class _FullFile:
    """A file on a disk that has room for its first bytes only."""

    def __init__(self, file):
        self._file = file

    def write(self, data) -> int:
        self._file.write(data[:10])
        self._file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> "_FullFile":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def disk_full(action: str, name: str, number: str = "1") -> None:
    """No space is left from the `number`th time on that files of a name are written, synchronised or replaced.

    A file is meant under its temporary name as well.
    """
    counter = iter(range(1, 1_000_000))

    def is_meant(path: object) -> bool:
        file = os.path.basename(str(path))
        meant = file == name or (file.startswith(f".{name}.") and file.endswith(".tmp"))
        return meant and next(counter) >= int(number)

    original_open, original_sync, original_replace = Path.open, os.fsync, os.replace

    def open_file(path: Path, mode: str = "r", *arguments, **options):
        file = original_open(path, mode, *arguments, **options)
        return _FullFile(file) if mode[0] in "wa" and is_meant(path) else file

    def sync(descriptor: int) -> None:
        if is_meant(os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        if is_meant(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original_replace(source, target)

    if action == "write":
        Path.open = open_file
    elif action == "fsync":
        os.fsync = sync
    else:
        os.replace = replace


def mounted(kind: str, folder: str) -> None:
    """A folder lies on a file system of its own, for this process: `read_only`, or `small` with a few free kilobytes.

    What is in the folder is there, too; of a small one a copy is left in `<folder>.left` in the end.
    """
    library = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts = 0x10000000, 0x00020000
    bind, remount, read_only, private, recursive = 4096, 32, 1, 1 << 18, 16384

    def call(function, *arguments) -> None:
        if function(*arguments):
            print("no mount here:", os.strerror(ctypes.get_errno()), file=sys.stderr, flush=True)
            os._exit(77)

    def mount(source: str, kind: str | None, flags: int, data: str | None = None) -> None:
        words = [word if word is None else word.encode() for word in (source, folder, kind)]
        call(library.mount, *words, flags, data if data is None else data.encode())

    user, group = os.geteuid(), os.getegid()
    call(library.unshare, new_mounts if user == 0 else new_mounts | new_user)
    if user:  # become the one who may mount, in a world of our own
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    call(library.mount, None, b"/", None, private | recursive, None)
    if kind == "read_only":
        mount(folder, None, bind)
        mount(folder, None, bind | remount | read_only)
        return
    content = Path(f"{folder}.left")
    shutil.copytree(folder, content)
    used = sum(path.stat().st_size for path in content.rglob("*"))
    mount("none", "tmpfs", 0, f"size={used + 300_000}")
    shutil.copytree(content, folder, dirs_exist_ok=True)

    def copy_out() -> None:
        shutil.rmtree(content)
        shutil.copytree(folder, content)

    atexit.register(copy_out)


def cache_full() -> None:
    """No space is left for the rows of a cache."""

    def fallocate(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.posix_fallocate = fallocate
