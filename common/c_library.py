"""Compile C code with the system's compiler on first use, keep the library per user, and load it.

A library is executed by being loaded, and one that was cut short ends the process with SIGBUS. So each ends with a checksum of
its bytes and of what it was made from, and a file whose end is another is never loaded, but compiled again.
"""

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

logger = logging.getLogger(__name__)

FLAGS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
_THREAD_FLAGS = ["-fopenmp", "-Wl,--as-needed"]
CACHE_VARIABLE = "BINARYAD_CACHE"
_FORMAT = "sha256 behind the end"
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_one_at_a_time = threading.Lock()


class CompilationError(Exception):
    """No compiler, or one that cannot compile the sources; the message says what it printed."""


def find_compiler() -> str | None:
    """`$CC` if it names one program, else the first of cc, gcc and clang on the path; None if there is none."""
    wanted = os.environ.get("CC")
    if wanted and shutil.which(wanted) is None:
        logger.warning("CC=%r is no program on the path; looking for cc, gcc and clang", wanted)
    for name in filter(None, [wanted, "cc", "gcc", "clang"]):
        found = shutil.which(name)
        if found:
            return found
    return None


def cache_folder() -> Path:
    """`$BINARYAD_CACHE`, else the user's cache folder; raises RuntimeError for a user without a home."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "binaryad"


def compile_sources(
    name: str,
    sources: Sequence[Path],
    compiler: str,
    folder: Path,
    extra_flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
) -> Path:
    """Compile into `folder` unless the same sources, compiler and flags were compiled before; returns the library.

    The first of the sources is compiled, the others are what it includes. The file's name begins with `name`. `libraries` are
    linked besides the mathematical one.

    The file is made under another name and renamed when complete and on the disk, so two processes may do this at once.

    Raises:
        CompilationError: the compiler failed.
        OSError: the folder cannot be written, or others than this user and root may write it.
    """
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilationError(f"{compiler} does not run: {error}") from error
    digest = hashlib.sha256()
    parts = [_FORMAT, version, platform.machine(), *FLAGS, *extra_flags, *libraries]
    for part in [*parts, *(source.read_text() for source in sources)]:
        digest.update(part.encode() + b"\0")
    library = folder / f"{name}-{digest.hexdigest()[:24]}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _refuse_shared(folder)
    if library.exists():
        if _is_intact(library, digest.digest()):
            return library
        logger.warning("%r is damaged or may have been written by others; it is not loaded, but compiled again", str(library))
    descriptor, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(descriptor)
    try:
        command = [compiler, *FLAGS, *extra_flags, "-o", temporary, str(sources[0]), "-lm", *libraries]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise CompilationError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
        os.chmod(temporary, 0o700)  # some linkers make the file anew, writable by whom the umask allows
        with open(temporary, "r+b") as file:
            file.write(_checksum(digest.digest(), file.read()))  # behind the end: the loader does not look there
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name without all of its bytes
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


def _loaded_openmp() -> list[str]:
    """The OpenMP library that torch has loaded: with another one beside it, two sets of threads fight for the cores."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "/libgomp" in line}
    return sorted(paths) if len(paths) == 1 else []


def _checksum(made_from: bytes, content: bytes) -> bytes:
    return hashlib.sha256(made_from + content).digest()


def _only_we_write(status: os.stat_result) -> bool:
    """Whether nobody but this user and root may have written it."""
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _refuse_shared(folder: Path) -> None:
    """Raise PermissionError for a folder in which others could put a library between its check and its loading."""
    status = folder.stat()
    if not _only_we_write(status):
        whose = f"belongs to user {status.st_uid} and has mode {stat.S_IMODE(status.st_mode):o}"
        raise PermissionError(f"{str(folder)!r} {whose}: others may write there; make it yours alone (chown, chmod 700)")


def _is_intact(library: Path, made_from: bytes) -> bool:
    """Whether the file is what `compile_sources` made of these sources: it is about to be executed."""
    try:
        descriptor = os.open(library, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place would be waited for
    except OSError:
        return False
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not _only_we_write(status):
            return False
        content = file.read()
    return content[-_CHECKSUM_BYTES:] == _checksum(made_from, content[:-_CHECKSUM_BYTES])


def open_library(name: str, sources: Sequence[Path], users: str) -> ctypes.CDLL | None:
    """The library, or None, with a warning, where it cannot be compiled; then `users`, a plural, run in plain torch."""
    compiler = find_compiler()
    if compiler is None:
        logger.warning("no C compiler found (cc, gcc, clang or $CC): %s run in plain torch, correct but slow", users)
        return None
    try:
        with _one_at_a_time:  # what one thread has compiled, the others find
            return ctypes.CDLL(str(_compiled(name, sources, compiler, users)))
    except (CompilationError, OSError, subprocess.TimeoutExpired) as error:
        logger.warning("the C %s cannot be used: %s; %s run in plain torch, correct but slow", name, error, users)
        return None


def _compiled(name: str, sources: Sequence[Path], compiler: str, users: str) -> Path:
    """The library in the cache, or, where that cannot be written, in a folder of this process alone."""
    compile_into = partial(_with_or_without_threads, partial(compile_sources, name, sources, compiler), users)
    try:
        return compile_into(cache_folder())
    except (OSError, RuntimeError) as error:
        folder = Path(tempfile.mkdtemp(prefix="binaryad-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        logger.warning("no cache for the %s (%s), each process compiles them; set %s to a folder", name, error, CACHE_VARIABLE)
        return compile_into(folder)


def _with_or_without_threads(compile_into: Callable[..., Path], users: str, folder: Path) -> Path:
    """Compiled with threads if the compiler has OpenMP, else without."""
    try:
        return compile_into(folder, _THREAD_FLAGS, _loaded_openmp())
    except CompilationError as error:
        library = compile_into(folder)
        logger.warning("compiled without OpenMP, so %s run on one thread: %s", users, error)
        return library
