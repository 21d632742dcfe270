"""What each of the operators takes, by its name: checked before C, or torch in its place, sees the arguments."""

from collections.abc import Callable, Mapping

import torch

from binarize.kernels.oracle import words_of
from common.c_arguments import Argument, Signature

PANEL, KEY_PADDING = 32, 16  # as in kernels.c
_FLOAT, _BITS = (torch.float32,), (torch.int32,)
_ANY_FLOAT = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # those are made float32
_Size = Callable[[Mapping[str, int]], int]


def _float(name: str, *shape: str, optional: bool = False) -> Argument:
    return Argument(name, _FLOAT, shape, optional)


def _any_float(name: str, *shape: str, optional: bool = False) -> Argument:
    return Argument(name, _ANY_FLOAT, shape, optional)


def _bits(name: str, *shape: str | int) -> Argument:
    return Argument(name, _BITS, shape)


def _words(of: str) -> _Size:
    return lambda sizes: words_of(sizes[of])


def _panels(of: str) -> _Size:
    return lambda sizes: -(-sizes[of] // PANEL)


def _padded_prototypes(sizes: Mapping[str, int]) -> int:
    return -(-sizes["prototypes"] // KEY_PADDING) * KEY_PADDING


_PER_HEAD = {
    "images": lambda sizes: sizes["rows"] // sizes["tokens"],
    "head width": lambda sizes: sizes["channels"] // sizes["heads"],
    "head width + 1": lambda sizes: sizes["head width"] + 1,
}
_SUMMARIES = ("images", "heads", "head width + 1", "head width")
_WITHOUT_ROWS = frozenset({"rows", "images"})

_SIGNATURES = [
    Signature(
        "pack",
        (_any_float("x", "rows", "inputs"), _float("threshold", "inputs")),
        made=(("rows", "words"),),
        derived={"words": _words("inputs")},
    ),
    Signature(
        "layer_norm_pack",
        (_any_float("x", "rows", "inputs"), *(_float(name, "inputs") for name in ("weight", "bias", "threshold"))),
        made=(("rows", "words"),),
        derived={"words": _words("inputs")},
    ),
    Signature(
        "linear",
        (
            _bits("bits", "rows", "words"),
            _bits("panels", "panels", "words", PANEL),
            _float("scale", "outputs"),
            _float("bias", "outputs"),
            _any_float("residual", "rows", "outputs", optional=True),
        ),
        made=(("rows", "outputs"),),
        derived={"words": _words("inputs"), "panels": _panels("outputs")},
    ),
    Signature(
        "linear_to_bits",
        (
            _bits("bits", "rows", "words"),
            _bits("panels", "panels", "words", PANEL),
            _bits("low", "outputs"),
            _bits("span", "outputs"),
        ),
        made=(("rows", "words of outputs"),),
        derived={"words": _words("inputs"), "panels": _panels("outputs"), "words of outputs": _words("outputs")},
    ),
    Signature(
        "prototype_attention",
        (
            _float("query", "images", "tokens", "channels"),
            _float("projected", "images", "prototypes", "2 channels"),
            _float("head_scale", "heads"),
            *(_float(name, "heads", optional=True) for name in ("share", "slope", "middle")),
            _float("threshold", "channels"),
        ),
        made=(("images", "tokens", "words"), ("images", "channels", "padded prototypes")),
        derived={
            "2 channels": lambda sizes: 2 * sizes["channels"],
            "words": _words("channels"),
            "padded prototypes": _padded_prototypes,
        },
        may_be_zero=frozenset({"images", "tokens"}),
    ),
    Signature(
        "linear_attention",
        (_float("projected", "rows", "3 channels"), _float("threshold", "channels", optional=True)),
        made=(("rows", "channels"), _SUMMARIES),
        derived={"channels": lambda sizes: sizes["3 channels"] // 3, **_PER_HEAD},
        may_be_zero=_WITHOUT_ROWS,
    ),
    Signature(
        "project_and_attend",
        (
            _bits("bits", "rows", "words"),
            _bits("panels", "panels", "words", PANEL),
            _float("scale", "3 channels"),
            _float("bias", "3 channels"),
            _float("threshold", "channels"),
        ),
        made=(("rows", "3 channels"), _SUMMARIES),  # the first where the operator is two
        derived={
            "3 channels": lambda sizes: 3 * sizes["channels"],
            "words": _words("channels"),
            "panels": _panels("3 channels"),
            **_PER_HEAD,
        },
        may_be_zero=_WITHOUT_ROWS,
    ),
    Signature(
        "project_and_transform",
        (
            _bits("bits", "rows", "words"),
            _bits("proj panels", "panels", "words", PANEL),
            _float("proj scale", "channels"),
            _float("proj bias", "channels"),
            _any_float("residual", "rows", "channels", optional=True),
            *(_float(f"norm {name}", "channels") for name in ("weight", "bias", "threshold")),
            _bits("fc1 panels", "panels of fc1", "words", PANEL),
            _bits("fc1 low", "hidden"),
            _bits("fc1 span", "hidden"),
            _bits("fc2 panels", "panels", "words of fc2", PANEL),
            _float("fc2 scale", "channels"),
            _float("fc2 bias", "channels"),
        ),
        made=(("rows", "channels"), ("rows", "words of fc2")),
        derived={
            "words": _words("channels"),
            "panels": _panels("channels"),
            "panels of fc1": _panels("hidden"),
            "words of fc2": _words("hidden"),
        },
    ),
    Signature("quantize", (_float("x", "rows", "columns"),), made=()),
    Signature(
        "layer_norm_quantize",
        (_float("x", "rows", "columns"), _float("weight", "columns"), _float("bias", "columns")),
        made=(),
    ),
    Signature(
        "gelu_quantize",
        (_float("sums", "rows", "columns"), _float("row_scales", "rows"), _float("bias", "columns")),
        made=(),
    ),
    Signature(
        "rescale",
        (
            _float("sums", "rows", "columns"),
            _float("row_scales", "rows"),
            _float("bias", "columns"),
            _float("layer_scale", "columns", optional=True),
            _float("residual", "rows", "columns", optional=True),
        ),
        made=(),
    ),
    Signature(
        "softmax_attention",
        (_float("sums", "rows", "3 channels"), _float("row_scales", "rows"), _float("bias", "3 channels")),
        made=(),
        derived={"channels": lambda sizes: sizes["3 channels"] // 3},
    ),
]
SIGNATURES = {signature.operator: signature for signature in _SIGNATURES}
