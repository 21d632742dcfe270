"""Compile the C kernels with the system's compiler on first use, keep them per user, and choose the path for this CPU."""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from common.c_library import CompilationError, cache_folder, compile_sources, find_compiler, open_library
from common.errors import UserError

__all__ = [
    "PATHS",
    "SOURCES",
    "CompilationError",
    "available_paths",
    "cache_folder",
    "chosen_path",
    "compile_library",
    "find_compiler",
    "load_library",
]

SOURCES = [
    Path(__file__).with_name(name) for name in ("kernels.c", "path.h", "linear_attention.h", "block.h", "int8.h", "attention.h")
]
# numbers as in kernels.c
PATHS = {"scalar": 0, "neon": 1, "avx2": 2, "avx512": 3}
_INCLUDES = {
    "scalar": ["scalar"],
    "neon": ["neon", "scalar"],
    "avx2": ["avx2", "scalar"],
    "avx512": ["avx512", "avx2", "scalar"],
}
PATH_VARIABLE = "BINARYAD_ISA"


def compile_library(compiler: str, folder: Path, extra_flags: Sequence[str] = (), libraries: Sequence[str] = ()) -> Path:
    """The kernels, compiled as `common.c_library.compile_sources` says."""
    return compile_sources("kernels", SOURCES, compiler, folder, extra_flags, libraries)


@cache
def load_library() -> ctypes.CDLL | None:
    """The kernels, or None, said once, where they cannot be compiled; then torch does the same arithmetic, slower."""
    return open_library("kernels", SOURCES, "binary layers")


def available_paths(library: ctypes.CDLL) -> list[str]:
    """Paths that run on this CPU, the fastest first."""
    best = library.binaryad_best_isa()
    return next(_INCLUDES[name] for name, number in PATHS.items() if number == best)


def chosen_path(library: ctypes.CDLL) -> str:
    """The fastest path, or the one that `$BINARYAD_ISA` names; raises UserError if that one does not run here."""
    available = available_paths(library)
    wanted = os.environ.get(PATH_VARIABLE) or available[0]
    if wanted not in available:
        raise UserError(f"{PATH_VARIABLE}={wanted!r} does not run on this CPU; choose from {' '.join(available)}, or unset it")
    return wanted
