"""The kernels against plain numpy: integers exactly, floats against float64 formulas, bits where float64 decides them.

A case takes an object whose methods have the names and the arguments of the operators in binarize/kernels, but take and
return arrays. `CKernels` is that for the compiled library; it needs neither torch nor the package, so that every case runs on
every path of this CPU quickly, also in a process that is watched by a sanitizer (sanitizers.py).
"""

import ctypes
import itertools
import math
from collections.abc import Callable
from functools import cache

import numpy as np

PATHS = {"scalar": 0, "neon": 1, "avx2": 2, "avx512": 3}
PATHS_OF_BEST = {0: ["scalar"], 1: ["neon", "scalar"], 2: ["avx2", "scalar"], 3: ["avx512", "avx2", "scalar"]}
THREADS = (1, 3)

ROWS = (0, 1, 2, 7, 8, 9, 33, 97)
INPUTS = (1, 5, 31, 33, 63, 64, 65, 100, 384, 1000, 2049)
OUTPUTS = (1, 17, 32, 33, 95, 96, 100)
VECTOR_WIDTHS = (1, 5, 15, 16, 17, 33, 100, 384)
PROTOTYPES, HEAD_WIDTHS, TOKENS, ATTENDED_IMAGES = (1, 6, 17, 64), (1, 5, 16, 64), (1, 15, 16, 17, 37), (1, 3)
WIDE_PROTOTYPE_ATTENTION = ((1, 17, 6, 800),)  # images, tokens, prototypes, channels per head
WIDE_LINEAR_ATTENTION = ((1, 17, 64, 64),)  # images, tokens, heads, channels per head
LINEAR_ROWS, LINEAR_HEAD_WIDTHS = (
    ((3, 1), (2, 5), (3, 16), (3, 17), (2, 261), (1, 789)),
    (1, 7, 16, 32, 55, 64),
)  # images, tokens
SOFTMAX_TOKENS, SOFTMAX_HEAD_WIDTHS = (1, 2, 15, 16, 17, 33, 100, 789), (32, 64)
PROJECTED_ROWS, PROJECTED_HEADS = ((0, 5), (3, 1), (2, 17), (1, 261)), ((1, 32), (3, 32), (2, 64), (1, 96))  # of each head
BLOCK_WIDTHS = ((1, 1), (32, 40), (33, 132), (64, 65), (100, 32), (160, 640))  # channels, hidden channels
# of five heads: plain, negative, with parallel keys, without a map, with a key of zeros
HEAD_SCALE, SHARE = [1.3, -0.7, 0.9, 0.0, 1.0], [0.25, 0.5, 0.125, 0.25, 1.0]
SLOPE, MIDDLE = [4.0, -3.0, 0.5, 4.0, 200.0], [1.0, 0.5, 0.2, 1.0, 0.3]
NEGATIVE_HEAD, PARALLEL_HEAD, ZERO_KEY_HEAD = 1, 2, 4

EPSILON = 1e-6
LINEAR_EPSILON = 1e-8
BLOCK_EPSILON = 0.25  # so much that it turns bits
FLOAT32_ROUNDING = 2.0**-24
BFLOAT16_ROUNDING = 2.0**-8
NORM_ERROR = 1e-5  # of layer norm in float32; more where a row's spread is far below its mean
MOST_UNDECIDED = 0.01
SMALLEST_GAP = 2e-4
MOST_INT32 = 2**31 - 1
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 0.25 + 2.0**-25, 0.25 - 2.0**-26]


class Mismatch(AssertionError):
    """A kernel's result is not what it must be; the message says where."""


class CKernels:
    """One path of the compiled library. Every array that C sees has exactly the size it needs, outputs hold garbage before."""

    def __init__(self, library: ctypes.CDLL, path: str, threads: int):
        self.library, self.path, self.threads = library, path, threads
        self.has_softmax_attention = path == "avx512" and bool(library.binaryad_has_softmax_attention())

    def _run(self, name: str, *arguments: np.ndarray | int | float | None) -> None:
        # a view may have memory behind its end that belongs to it, where no sanitizer would notice a wrong access
        whole = [own_memory(value) if isinstance(value, np.ndarray) else value for value in arguments]
        getattr(self.library, f"binaryad_{name}")(PATHS[self.path], self.threads, *map(c_value, whole))

    def pack(self, x, threshold):
        bits = garbage_words(*x.shape)
        self._run("pack", x, *x.shape, threshold, bits)
        return bits

    def layer_norm_pack(self, x, weight, bias, eps, threshold):
        bits = garbage_words(*x.shape)
        self._run("layer_norm_pack", x, *x.shape, weight, bias, eps, threshold, bits)
        return bits

    def linear(self, bits, panels, in_features, scale, bias, residual):
        out = garbage((len(bits), len(scale)), np.float32)
        self._run("linear", bits, len(bits), panels, in_features, len(scale), scale, bias, residual, out)
        return out

    def linear_in_place(self, bits, panels, in_features, scale, bias, residual):
        out = residual.copy()
        self._run("linear", bits, len(bits), panels, in_features, len(scale), scale, bias, out, out)
        return out

    def linear_to_bits(self, bits, panels, in_features, low, span):
        out = garbage_words(len(bits), len(low))
        self._run("linear_to_bits", bits, len(bits), panels, in_features, len(low), low, span, out)
        return out

    def prototype_attention(self, query, projected, head_scale, share, slope, middle, threshold):
        images, tokens, width = query.shape
        count, heads = projected.shape[1], len(head_scale)
        keys = garbage((images * width * (-(-count // 16) * 16),), np.float32)
        bits = garbage_words(images * tokens, width)
        sizes = (count, heads, width // heads)
        gates = (head_scale, share, slope, middle)
        self._run("prototype_attention", query, images, tokens, projected, *sizes, keys, *gates, threshold, bits)
        return bits

    def linear_attention(self, projected, tokens, heads, threshold):
        rows, width = len(projected), projected.shape[1] // 3
        images, d = rows // tokens, width // heads
        summaries = garbage((images * heads * (d + 1) * d,), np.float32)
        out = garbage((rows, width), np.float32) if threshold is None else garbage_words(rows, width)
        bits, floats = (None, out) if threshold is None else (out, None)
        self._run("linear_attention", projected, images, tokens, heads, d, summaries, threshold, bits, floats)
        return out

    def project_and_attend(self, bits, panels, scale, bias, tokens, heads, threshold):
        images, width = len(bits) // tokens, len(threshold)
        d = width // heads
        summaries = garbage((images * heads * (d + 1) * d,), np.float32)
        out = garbage_words(len(bits), width)
        sizes = (images, tokens, heads, d)
        self._run("project_and_attend", bits, panels, scale, bias, *sizes, summaries, threshold, out)
        return out

    def project_and_transform(self, bits, proj, residual, norm, eps, fc1, fc2):
        width, hidden = len(proj[1]), len(fc1[1])
        out = garbage((len(bits), width), np.float32)
        weight, bias, threshold = norm
        layers = (*proj, residual, weight, bias, eps, threshold, *fc1, *fc2)
        self._run("project_and_transform", bits, len(bits), width, hidden, *layers, out)
        return out

    def quantize(self, x):
        out, scales = garbage(x.shape, np.uint8), garbage(x.shape[:1], np.float32)
        self._run("quantize", x, *x.shape, out, scales)
        return out, scales

    def layer_norm_quantize(self, x, weight, bias, eps):
        out, scales = garbage(x.shape, np.uint8), garbage(x.shape[:1], np.float32)
        self._run("layer_norm_quantize", x, *x.shape, weight, bias, eps, out, scales)
        return out, scales

    def gelu_quantize(self, sums, row_scales, bias):
        out, scales = garbage(sums.shape, np.uint8), garbage(sums.shape[:1], np.float32)
        self._run("gelu_quantize", sums, *sums.shape, row_scales, bias, out, scales)
        return out, scales

    def rescale(self, sums, row_scales, bias, layer_scale, residual):
        out = garbage(sums.shape, np.float32)
        self._run("rescale", sums, *sums.shape, row_scales, bias, layer_scale, residual, out)
        return out

    def softmax_attention(self, sums, row_scales, bias, tokens, heads):
        width = sums.shape[1] // 3
        out = garbage((len(sums), width), np.float32)
        images = len(sums) // tokens
        self._run("softmax_attention", sums, images, tokens, heads, width // heads, row_scales, bias, out)
        return out


def own_memory(array: np.ndarray) -> np.ndarray:
    """The array itself if it is dense and owns its memory, else a copy that is and does."""
    if array.dtype not in (np.float32, np.int32, np.uint8):
        raise TypeError(f"no kernel takes {array.dtype}")
    return array if array.base is None and array.flags.c_contiguous else array.copy()


def c_value(value: np.ndarray | int | float | None) -> ctypes._SimpleCData | None:
    """As C takes it."""
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_float(value) if isinstance(value, float) else None if value is None else ctypes.c_int64(value)


def garbage(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """An output that nobody may leave as it is: NaN, or bytes 0xa5."""
    return np.full(shape, np.nan if kind is np.float32 else kind(-0x5A5A5A5B if kind is np.int32 else 0xA5), dtype=kind)


def words_of(features: int) -> int:
    return 2 * -(-features // 64)


def garbage_words(rows: int, features: int) -> np.ndarray:
    return garbage((rows, words_of(features)), np.int32)


def packed(positive: np.ndarray) -> np.ndarray:
    """(rows, k) bool -> (rows, words) int32, unused bits 0."""
    rows, features = positive.shape
    padded = np.zeros((rows, 32 * words_of(features)), dtype=bool)
    padded[:, :features] = positive
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def unpacked(words: np.ndarray, features: int) -> np.ndarray:
    """(rows, words) int32 -> (rows, k) bool."""
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :features].astype(bool)


def panels_of(positive: np.ndarray) -> np.ndarray:
    """Weight signs (n, k) bool -> (panels, words, 32) int32."""
    words = packed(positive)
    padded = np.zeros((-(-len(words) // 32) * 32, words.shape[1]), dtype=np.int32)
    padded[: len(words)] = words
    return np.ascontiguousarray(padded.reshape(-1, 32, words.shape[1]).transpose(0, 2, 1))


def float32(values: np.ndarray | list) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


def quarters(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Multiples of 1/4 from -1 to 1: sums and products of a few of them are exact, and often equal."""
    return float32(random.integers(-4, 5, shape) / 4)


def check_that(wrong: np.ndarray, found: np.ndarray, expected: np.ndarray, where: str) -> None:
    """Raise Mismatch at the first place that is wrong."""
    if wrong.any():
        place = tuple(int(index) for index in np.argwhere(wrong)[0])
        count = f"{wrong.sum()} of {wrong.size} wrong"
        raise Mismatch(f"{where}: {found[place]} instead of {expected[place]} at {place}, {count}")


def check_equal(found: np.ndarray, expected: np.ndarray, where: str) -> None:
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise Mismatch(f"{where}: {found.dtype} {found.shape} instead of {expected.dtype} {expected.shape}")
    check_that(found != expected, found, expected, where)


def check_close(found: np.ndarray, expected: np.ndarray, bound: np.ndarray, where: str) -> None:
    if found.shape != expected.shape:
        raise Mismatch(f"{where}: {found.shape} instead of {expected.shape}")
    check_that(~(np.abs(found - expected) <= bound), found, expected, where)  # NaN is wrong


def check_bits(found: np.ndarray, expected: np.ndarray, decided: np.ndarray, where: str) -> None:
    """Bits where they are decided, and that unused bits are 0; expected and decided (rows, k) bool."""
    signs = unpacked(found, expected.shape[1])
    check_equal(found, packed(signs), f"{where}, unused bits")
    check_that((signs != expected) & decided, signs, expected, where)


def check_few(undecided: list[np.ndarray], where: str) -> None:
    """That a case compared nearly everything."""
    share = sum(int(part.sum()) for part in undecided) / max(sum(part.size for part in undecided), 1)
    if share > MOST_UNDECIDED:
        raise Mismatch(f"{where}: {share:.1%} are too near to a threshold to be compared, the case is badly chosen")


def pack(kernels: CKernels) -> None:
    for rows, features in itertools.product(ROWS, INPUTS):
        random = np.random.default_rng([rows, features])
        x, threshold = quarters(random, rows, features), quarters(random, features)
        x = np.where(random.random(x.shape) < 0.1, random.choice(float32(SPECIAL), x.shape), x)
        threshold = np.where(
            random.random(features) < 0.1, random.choice(float32([-0.0, np.inf, -np.inf]), features), threshold
        )
        x[np.isinf(x) & (x == threshold)] = 0  # inf - inf is not defined
        check_equal(kernels.pack(x, threshold), packed(x >= threshold), f"pack {rows} x {features}")


@cache
def layer_norm_problem(rows: int, features: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """(x, weight, bias) with rows of different sizes, of zeros and of one constant; and their layer norm in float64."""
    random = np.random.default_rng([rows, features])
    x = normal(random, rows, features) * float32(10.0 ** random.integers(-1, 3, (rows, 1))) + normal(random, rows, 1)
    x[1:2], x[3:4] = 0, 0.5
    weight, bias = normal(random, features), normal(random, features)
    values = x.astype(np.float64)
    centred = values - values.mean(axis=1, keepdims=True)
    norm = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPSILON) * weight + bias
    return (x, weight, bias), norm


def layer_norm_pack(kernels: CKernels) -> None:
    undecided = []
    for rows, features in itertools.product(ROWS, INPUTS):
        arguments, norm = layer_norm_problem(rows, features)
        threshold = normal(np.random.default_rng(features), features)
        decided = np.abs(norm - threshold) > NORM_ERROR
        undecided.append(~decided)
        found = kernels.layer_norm_pack(*arguments, EPSILON, threshold)
        check_bits(found, norm >= threshold, decided, f"layer_norm_pack {rows} x {features}")
    check_few(undecided, "layer_norm_pack")


@cache
def product_problem(rows: int, features: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activation bits, panels, and the product (rows, outputs) of their signs; some with no and with only mismatches."""
    random = np.random.default_rng([rows, features, outputs])
    activations, weights = random.random((rows, features)) < 0.5, random.random((outputs, features)) < 0.5
    activations[-1:], activations[:1] = False, True
    weights[-1:], weights[:1] = False, True
    signs = [np.where(part, 1, -1).astype(np.int64) for part in (activations, weights)]
    return packed(activations), panels_of(weights), signs[0] @ signs[1].T


def linear_sizes() -> itertools.product:
    return itertools.product(ROWS, INPUTS, OUTPUTS)


def linear(kernels: CKernels) -> None:
    for rows, features, outputs in linear_sizes():
        where = f"linear {rows} x {features} -> {outputs}"
        bits, panels, product = product_problem(rows, features, outputs)
        random = np.random.default_rng(rows + features)
        scale = float32(2.0 ** random.integers(-3, 3, outputs) * random.choice([-1, 1], outputs))
        bias, residual = quarters(random, outputs), quarters(random, rows, outputs)
        exact = float32(product * scale + bias)
        check_equal(kernels.linear(bits, panels, features, scale, bias, None), exact, where)
        found = kernels.linear(bits, panels, features, scale, bias, residual)
        check_equal(found, exact + residual, f"{where} with residual")
        scale, bias, residual = normal(random, outputs), normal(random, outputs), normal(random, rows, outputs)
        parts = [product * scale.astype(np.float64), np.broadcast_to(bias.astype(np.float64), product.shape), residual]
        bound = 4 * FLOAT32_ROUNDING * sum(np.abs(part) for part in parts)
        check_close(kernels.linear(bits, panels, features, scale, bias, residual), sum(parts), bound, f"{where}, any scale")


def linear_in_place(kernels: CKernels) -> None:
    for rows, features, outputs in linear_sizes():
        bits, panels, product = product_problem(rows, features, outputs)
        random = np.random.default_rng(rows + features)
        bias, residual = quarters(random, outputs), quarters(random, rows, outputs)
        found = kernels.linear_in_place(bits, panels, features, np.ones(outputs, np.float32), bias, residual)
        check_equal(found, float32(product) + bias + residual, f"linear {rows} x {features} -> {outputs} in place")


def intervals(
    kind: np.ndarray, features: int, counts: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(low, span) of one kind per output: empty, full, half lines, inner, at or just beside a count that occurs, enormous."""
    inner = random.integers(0, features + 1, len(kind))
    length = np.minimum(random.integers(0, features // 4 + 1, len(kind)), features - inner)
    empty, full = (features + 1, 0), (0, features)
    near = [(counts, 0), (counts + 1, features), (np.maximum(counts - 1, 0), 0), (0, counts)]
    extreme = [(MOST_INT32, 0), (0, MOST_INT32)]
    kinds = [empty, full, (0, inner), (inner, features - inner), (inner, length), *near, *extreme]
    low, span = (np.choose(kind % len(kinds), [pair[part] for pair in kinds]) for part in (0, 1))
    return low.astype(np.int32), span.astype(np.int32)


def linear_to_bits(kernels: CKernels) -> None:
    for rows, features, outputs in linear_sizes():
        bits, panels, product = product_problem(rows, features, outputs)
        mismatches = (features - product) // 2
        occurring = mismatches[rows // 2] if rows else np.zeros(outputs, np.int64)
        kind = np.arange(outputs) + features + rows
        low, span = intervals(kind, features, occurring, np.random.default_rng(features))
        expected = (mismatches < low) | (mismatches > low.astype(np.int64) + span)
        found = kernels.linear_to_bits(bits, panels, features, low, span)
        check_equal(found, packed(expected), f"linear_to_bits {rows} x {features} -> {outputs}")


def normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def by_head(rows: np.ndarray, heads: int) -> np.ndarray:
    """(images, rows, heads * d) -> (images, heads, rows, d) in float64."""
    return rows.astype(np.float64).reshape(*rows.shape[:2], heads, rows.shape[2] // heads).transpose(0, 2, 1, 3)


def by_row(heads: np.ndarray) -> np.ndarray:
    """(images, heads, rows, d) -> (images * rows, heads * d)."""
    return heads.transpose(0, 2, 1, 3).reshape(heads.shape[0] * heads.shape[2], heads.shape[1] * heads.shape[3])


def attention_truth(query, projected, head_scale, share, slope, middle) -> tuple[np.ndarray, np.ndarray]:
    """The attention's output (images * tokens, heads * d) in float64, and how much float32 may be away from it there.

    That is infinite where a map entry, or a row's maximum, is so near to its threshold that float32 may decide otherwise.
    """
    heads = len(head_scale)
    keys, values = (by_head(part, heads) for part in np.split(projected, 2, axis=-1))
    scale = head_scale.astype(np.float64).reshape(heads, 1, 1)
    share, slope, middle = (None if part is None else part.reshape(heads, 1, 1) for part in (share, slope, middle))
    cosines = scale * (normalised(by_head(query, heads)) @ normalised(keys).swapaxes(-1, -2))
    entries = np.maximum(cosines, 0)
    maximum = entries.max(axis=-1, keepdims=True)
    shaky = np.zeros(maximum.shape, dtype=bool)
    if share is not None:
        near = (np.abs(entries - share * maximum) <= 1e-5 * np.abs(scale)) & (maximum > 0)
        largest = cosines.max(axis=-1, keepdims=True)
        shaky = (near.sum(axis=-1, keepdims=True) > (share == 1)) | ((largest != 0) & (np.abs(largest) <= 1e-5 * np.abs(scale)))
        chosen = (entries >= share * maximum) & (maximum > 0)
        row_scale = (entries * chosen).sum(axis=-1, keepdims=True) / np.maximum(chosen.sum(axis=-1, keepdims=True), 1)
        gate = 1.0
        if slope is not None:
            relative = maximum / np.maximum(np.abs(scale), 1e-6)
            gate = 1 / (1 + np.exp(-slope * (relative - middle)))
        entries = (1 - gate) * entries + gate * row_scale * chosen
    size = entries @ np.abs(values)
    rounding = 1e-4 * size + np.where(size > 0, 1e-6 * np.abs(scale) * np.abs(values).sum(axis=-2, keepdims=True), 0)
    return by_row(entries @ values), by_row(np.where(shaky, np.inf, rounding))


@cache
def attention_problem(variant: str, images: int, tokens: int, count: int, width: int) -> tuple[list, np.ndarray, np.ndarray]:
    """Arguments of `prototype_attention`, its output and that output's possible error; variant plain, binary or gated."""
    random = np.random.default_rng([images, tokens, count, width])
    heads = len(HEAD_SCALE)
    query = normal(random, images, tokens, heads, width)
    keys, values = normal(random, images, count, heads, width), normal(random, images, count, heads, width)
    direction = normal(random, images, 1, width)
    keys[:, :, PARALLEL_HEAD] = direction * float32(random.uniform(0.1, 2, (images, count, 1)))
    keys[:, -1, ZERO_KEY_HEAD] = 0
    query[:, 1:2] = 0
    query[:, 2:3, PARALLEL_HEAD] = -direction  # no entry of its map is positive
    query[:, 3:4, NEGATIVE_HEAD] = keys[:, :1, NEGATIVE_HEAD]
    query = query.reshape(images, tokens, -1)
    projected = np.concatenate([part.reshape(images, count, -1) for part in (keys, values)], axis=-1)
    gates = [float32(part) for part in (HEAD_SCALE, SHARE, SLOPE, MIDDLE)]
    gates[{"plain": 1, "binary": 2, "gated": 4}[variant] :] = [None] * {"plain": 3, "binary": 2, "gated": 0}[variant]
    threshold = normal(random, heads * width) * float32(random.choice([0, 0.1, 1], heads * width))
    output, error = attention_truth(query, projected, *gates)
    return [query, projected, *gates, threshold], output, error


def prototype_attention(kernels: CKernels) -> None:
    sizes = list(itertools.product(ATTENDED_IMAGES, TOKENS, PROTOTYPES, HEAD_WIDTHS))
    undecided = []
    for variant, size in itertools.product(("plain", "binary", "gated"), [*sizes, *WIDE_PROTOTYPE_ATTENTION]):
        arguments, output, error = attention_problem(variant, *size)
        distance = output - arguments[-1]
        decided = (np.abs(distance) > error) | (error == 0)
        undecided.append(~decided)
        where = "{} prototype_attention, {} images, {} tokens, {} prototypes, {} channels per head".format(variant, *size)
        check_bits(kernels.prototype_attention(*arguments), distance >= 0, decided, where)
    check_few(undecided, "prototype_attention")


@cache
def linear_problem(images: int, tokens: int, heads: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values with all sizes of features, their linear attention in float64, and the same of |values|.

    The truth is the quadratic form: all tokens' weights for all tokens, each row divided by its sum.
    """
    random = np.random.default_rng([images, tokens, heads, width])
    shape = (images * tokens, 3, heads, width)
    projected = normal(random, *shape) * float32(random.choice([0.1, 1, 4], (*shape[:-1], 1)))
    projected[:, :2] += float32(random.choice([0, 0, -20, 6], (shape[0], 2, heads, 1)))
    projected = projected.reshape(len(projected), -1)
    return projected, *linear_attention_truth(projected, tokens, heads)


def linear_attention_truth(projected: np.ndarray, tokens: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Linear attention (images * tokens, heads * d) in float64, and the same of |values|."""
    parts = np.split(projected.reshape(-1, tokens, projected.shape[1]), 3, axis=-1)
    query, key, value = (by_head(part, heads) for part in parts)
    query, key = (np.where(part > 0, part + 1, np.exp(np.minimum(part, 0))) for part in (query, key))
    weights = query @ key.swapaxes(-1, -2)
    weights /= weights.sum(axis=-1, keepdims=True) + LINEAR_EPSILON
    return by_row(weights @ value), by_row(weights @ np.abs(value))


def linear_attention(kernels: CKernels) -> None:
    sizes = [(*rows, 3, width) for rows, width in itertools.product(LINEAR_ROWS, LINEAR_HEAD_WIDTHS)]
    for images, tokens, heads, width in [*sizes, *WIDE_LINEAR_ATTENTION]:
        where = f"linear_attention, {images} images, {tokens} tokens, {heads} heads of {width}"
        projected, output, size = linear_problem(images, tokens, heads, width)
        found = kernels.linear_attention(projected, tokens, heads, None)
        check_close(found, output, 1e-5 * size, where)
        threshold = float32(np.random.default_rng(width).choice([0, 0.1, -0.3], heads * width))
        bits = kernels.linear_attention(projected, tokens, heads, threshold)
        check_equal(bits, packed(found >= threshold), f"{where}, bits")


def threshold_between(values: np.ndarray) -> np.ndarray:
    """For each column of (rows, k) a threshold near the middle that none of its values is near, (k,) float32."""
    if not len(values):
        return np.zeros(values.shape[1], np.float32)
    ends = [values.min(axis=0, keepdims=True) - 1, values.max(axis=0, keepdims=True) + 1]
    ordered = np.sort(np.concatenate([values, *ends]), axis=0)
    gaps = np.diff(ordered, axis=0)
    from_middle = np.abs(np.arange(len(gaps)) - len(gaps) // 2)[:, None]
    chosen = np.where(gaps > SMALLEST_GAP, from_middle, len(gaps)).argmin(axis=0)[None]
    return float32(np.take_along_axis(ordered[:-1] + gaps / 2, chosen, axis=0)[0])


def project_and_attend(kernels: CKernels) -> None:
    """Projections in float64, attention in its quadratic form, and thresholds that no value is near."""
    for (images, tokens), (heads, d) in itertools.product(PROJECTED_ROWS, PROJECTED_HEADS):
        where = f"project_and_attend, {images} images, {tokens} tokens, {heads} heads of {d}"
        rows, width = images * tokens, heads * d
        bits, panels, product = product_problem(rows, width, 3 * width)
        random = np.random.default_rng([rows, width])
        scale, bias = normal(random, 3 * width) / float32(math.sqrt(width)), normal(random, 3 * width)
        output, _ = linear_attention_truth(product * scale.astype(np.float64) + bias, tokens, heads)
        threshold = threshold_between(output)
        found = kernels.project_and_attend(bits, panels, scale, bias, tokens, heads, threshold)
        check_equal(found, packed(output >= threshold), where)


@cache
def transform_problem(rows: int, width: int, hidden: int, with_residual: bool) -> tuple[list, np.ndarray, np.ndarray]:
    """Arguments of `project_and_transform`, its output in float64, and how much float32 may be away from it.

    No value of the norm is near its threshold, so that all bits are certain.
    """
    random = np.random.default_rng([rows, width, hidden])
    bits, proj_panels, product = product_problem(rows, width, width)
    proj_scale, proj_bias = normal(random, width) / float32(math.sqrt(width)), normal(random, width)
    residual = 2 * normal(random, rows, width) if with_residual else None
    parts = [product * proj_scale.astype(np.float64), np.broadcast_to(proj_bias, product.shape)]
    parts += [residual] if with_residual else []
    x = sum(parts)
    weight, bias = normal(random, width), normal(random, width)
    centred = x - x.mean(axis=1, keepdims=True)
    norm = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + BLOCK_EPSILON) * weight + bias
    threshold = threshold_between(norm)
    fc1, fc2 = random.random((hidden, width)) < 0.5, random.random((width, hidden)) < 0.5
    mismatches = ((norm >= threshold)[:, None] != fc1).sum(axis=-1)
    occurring = mismatches[rows // 2] if rows else np.zeros(hidden, np.int64)
    low, span = intervals(np.arange(hidden) + width, width, occurring, random)
    inner = (mismatches < low) | (mismatches > low.astype(np.int64) + span)
    fc2_scale, fc2_bias = normal(random, width), normal(random, width)
    parts += [(hidden - 2 * (inner[:, None] != fc2).sum(axis=-1)) * fc2_scale.astype(np.float64), fc2_bias]
    size = sum(np.abs(part) for part in parts)
    layers = [[proj_panels, proj_scale, proj_bias], residual, [weight, bias, threshold], BLOCK_EPSILON]
    layers += [[panels_of(fc1), low, span], [panels_of(fc2), fc2_scale, fc2_bias]]
    return [bits, *layers], sum(parts), 8 * FLOAT32_ROUNDING * size


def project_and_transform(kernels: CKernels) -> None:
    for rows, widths, with_residual in itertools.product(ROWS, BLOCK_WIDTHS, (False, True)):
        where = "project_and_transform {} x {}, {} hidden, residual {}".format(rows, *widths, with_residual)
        arguments, output, bound = transform_problem(rows, *widths, with_residual)
        check_close(kernels.project_and_transform(*arguments), output, bound, where)


def check_quantized(found: tuple[np.ndarray, np.ndarray], values: np.ndarray, error: float, where: str) -> np.ndarray:
    """Bytes and scales of float64 values, which float32 knows up to `error`.

    A byte may be one more or less where a half is near; returns where that is.
    """
    rows, scales = found
    expected_scales = np.abs(values).max(axis=1) / 127
    check_close(scales, expected_scales, (error / 127 + 3e-7 * expected_scales) * (expected_scales > 0), f"{where}, scales")
    quotients = values / np.where(expected_scales > 0, expected_scales, 1)[:, None]
    undecided = np.maximum(1e-3, 2 * error / np.where(expected_scales > 0, expected_scales, 1))[:, None]
    near_half = np.abs(np.abs(quotients - np.trunc(quotients)) - 0.5) < undecided
    expected = (128 + np.rint(quotients)).astype(np.uint8)
    check_that(np.abs(rows.astype(np.int64) - expected) > near_half, rows, expected, where)
    return near_half


def vector_sizes() -> itertools.product:
    return itertools.product(ROWS, VECTOR_WIDTHS)


def quantize(kernels: CKernels) -> None:
    near_halves = []
    for rows, width in vector_sizes():
        random = np.random.default_rng([rows, width])
        x = normal(random, rows, width) * float32(10.0 ** random.integers(-20, 20, (rows, 1)))
        x[1:2], x[3:4, 1:], x[4:5] = 0, -0.0, -np.abs(x[4:5])
        near_halves.append(check_quantized(kernels.quantize(x), x.astype(np.float64), 0, f"quantize {rows} x {width}"))
    check_few(near_halves, "quantize")


def quantize_halves(kernels: CKernels) -> None:
    x = float32([np.arange(-127, 127.5, 0.5), np.arange(127, -127.5, -0.5)])
    bytes_, scales = kernels.quantize(x)
    check_equal(scales, np.ones(2, np.float32), "quantize halves, scales")
    check_equal(bytes_, (128 + np.rint(x)).astype(np.uint8), "quantize halves")  # numpy also takes the even neighbour


def quantize_extremes(kernels: CKernels) -> None:
    """Rows whose scale has no inverse in float32 are zeros; what is not finite shows in the scale, whatever its place."""
    for width in VECTOR_WIDTHS:
        x = np.zeros((4 * width, width), np.float32)
        places = np.arange(width)
        for row, extreme in enumerate((-1e-36, 2e-36, np.nan, -np.inf)):
            x[row * width + places, places] = extreme
        bytes_, scales = kernels.quantize(x)
        expected = float32([0, 2e-36 / 127, np.nan, np.inf]).repeat(width)
        where = f"quantize {width} columns with an extreme"
        check_that(~np.isclose(scales, expected, rtol=1e-6, atol=0, equal_nan=True), scales, expected, f"{where}, scales")
        defined = np.where(x[: 2 * width] > 0, 255, 128).astype(np.uint8)
        check_equal(bytes_[: 2 * width], defined, where)


def layer_norm_quantize(kernels: CKernels) -> None:
    near_halves = []
    for rows, width in vector_sizes():
        arguments, norm = layer_norm_problem(rows, width)
        found = kernels.layer_norm_quantize(*arguments, EPSILON)
        near_halves.append(check_quantized(found, norm, NORM_ERROR, f"layer_norm_quantize {rows} x {width}"))
    check_few(near_halves, "layer_norm_quantize")


def gelu_truth(x: np.ndarray) -> np.ndarray:
    return x * np.vectorize(lambda value: math.erfc(-value / math.sqrt(2)) / 2, otypes=[np.float64])(x)


def gelu_quantize(kernels: CKernels) -> None:
    near_halves = []
    for rows, width in vector_sizes():
        random = np.random.default_rng([rows, width])
        sums, bias = 50 * normal(random, rows, width), normal(random, width)
        row_scales = float32(random.uniform(0.02, 0.1, rows))
        sums[:, 0], bias[0] = np.abs(sums[:, 0]), 1  # a small largest value would magnify the error of GELU itself
        hidden = gelu_truth(sums.astype(np.float64) * row_scales[:, None] + bias)
        found = kernels.gelu_quantize(sums, row_scales, bias)
        near_halves.append(check_quantized(found, hidden, 1e-6, f"gelu_quantize {rows} x {width}"))
        zeros = np.zeros_like(sums)
        found = kernels.gelu_quantize(zeros, row_scales, np.zeros_like(bias))
        check_quantized(found, zeros, 0, f"gelu_quantize {rows} x {width} of zeros")
    check_few(near_halves, "gelu_quantize")


def gelu(kernels: CKernels) -> None:
    """The scale of a row that repeats one number is |gelu| / 127, and its bytes have the sign."""
    x = float32([*np.linspace(-12, 12, 4801), -1e4, 1e4, -1e-3, 1e-3, -1e-30, 1e-30, -0.0, 0])
    expected = gelu_truth(x.astype(np.float64))
    for width in (1, 16):
        sums = np.repeat(x, width).reshape(-1, width)
        bytes_, scales = kernels.gelu_quantize(sums, np.ones(len(x), np.float32), np.zeros(width, np.float32))
        found = np.sign(bytes_[:, 0] - 128.0) * scales * 127
        check_close(found, expected, 1e-6 + 4 * FLOAT32_ROUNDING * np.abs(expected), f"gelu in rows of {width}")
        check_equal(bytes_, np.repeat(bytes_[:, :1], width, axis=1), f"gelu in rows of {width}")


def rescale(kernels: CKernels) -> None:
    for rows, width in vector_sizes():
        random = np.random.default_rng([rows, width])
        sums, residual = 100 * normal(random, rows, width), normal(random, rows, width)
        row_scales, bias, layer_scale = normal(random, rows), normal(random, width), normal(random, width)
        for factor, added in itertools.product((None, layer_scale), (None, residual)):
            where = f"rescale {rows} x {width}, layer scale {factor is not None}, residual {added is not None}"
            parts = [sums.astype(np.float64) * row_scales[:, None], np.broadcast_to(bias, sums.shape)]
            parts = parts if factor is None else [part * factor.astype(np.float64) for part in parts]
            parts = parts if added is None else [*parts, added]
            bound = 4 * FLOAT32_ROUNDING * sum(np.abs(part) for part in parts)
            check_close(kernels.rescale(sums, row_scales, bias, factor, added), sum(parts), bound, where)


def softmax_truth(sums, row_scales, bias, tokens: int, heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Softmax attention (images * tokens, C) in float64, the same of |values|, and each row's largest sum |q k| / sqrt(d)."""
    projected = (sums.astype(np.float64) * row_scales[:, None] + bias).reshape(-1, tokens, sums.shape[1])
    query, key, value = (by_head(part, heads) for part in np.split(projected, 3, axis=-1))
    root = math.sqrt(query.shape[-1])
    scores = query @ key.swapaxes(-1, -2) / root
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    terms = (np.abs(query) @ np.abs(key).swapaxes(-1, -2)).max(axis=-1, keepdims=True) / root
    return by_row(weights @ value), by_row(weights @ np.abs(value)), by_row(np.broadcast_to(terms, value.shape))


def softmax_attention(kernels: CKernels) -> None:
    """Queries, keys, values and probabilities are rounded to bfloat16: scores move by two roundings of their terms' sizes."""
    if not kernels.has_softmax_attention:
        return
    two_roundings = (1 + BFLOAT16_ROUNDING) ** 2
    for tokens, width in itertools.product(SOFTMAX_TOKENS, SOFTMAX_HEAD_WIDTHS):
        images, heads = (3, 2) if tokens < 100 else (2, 1)
        random = np.random.default_rng([tokens, width])
        sums, bias = 10 * normal(random, images * tokens, 3 * heads * width), normal(random, 3 * heads * width) / 4
        row_scales = float32(random.uniform(0.02, 0.08, images * tokens))
        output, size, terms = softmax_truth(sums, row_scales, bias, tokens, heads)
        bound = size * (np.exp(2 * terms * (two_roundings - 1)) * two_roundings - 1)
        where = f"softmax_attention, {images} images, {tokens} tokens, {heads} heads of {width}"
        check_close(kernels.softmax_attention(sums, row_scales, bias, tokens, heads), output, bound, where)


def softmax_attention_exact(kernels: CKernels) -> None:
    """Enormous scores of numbers that bfloat16 holds: probabilities are 0 or all equal, so that only float32 rounds."""
    if not kernels.has_softmax_attention:
        return
    images, heads = 2, 3
    for tokens, width, size in itertools.product(SOFTMAX_TOKENS[:-1], SOFTMAX_HEAD_WIDTHS, (0, 64, 8192)):
        value = quarters(np.random.default_rng([tokens, width]), images, tokens, heads, width)
        equal = np.ones(value.shape)
        one_hot = equal * np.eye(width)[np.arange(tokens) % width][None, :, None]
        for what, query, key in (("equal", equal, -equal), ("single", one_hot, one_hot), ("other", -one_hot, one_hot)):
            sums = float32(np.stack([size * query, size * key, value], axis=2)).reshape(images * tokens, -1)
            row_scales, bias = np.full(images * tokens, 0.5, np.float32), np.zeros(sums.shape[1], np.float32)
            output, magnitude, _ = softmax_truth(sums, row_scales, bias, tokens, heads)
            where = f"softmax_attention to {what} keys, {tokens} tokens, {heads} heads of {width}, size {size}"
            found = kernels.softmax_attention(sums, row_scales, bias, tokens, heads)
            check_close(found, output, 1e-6 * magnitude + 1e-30, where)


def softmax_attention_powers(kernels: CKernels) -> None:
    """Two keys whose probabilities are as 1 to 2^-x: bfloat16 holds what is multiplied, and the sum of both is float32."""
    if not kernels.has_softmax_attention:
        return
    width, exponents = 32, np.arange(0, 16, 1 / 16)  # the longest have 8 bits
    query, key, value = (np.zeros((len(exponents), 2, width)) for _ in range(3))
    query[:, :, 0] = math.sqrt(width) * math.log(2)
    key[:, 1, 0] = -exponents
    value[:, 0] = 1
    sums = float32(np.concatenate([query, key, value], axis=-1)).reshape(2 * len(exponents), -1)
    row_scales, bias = np.ones(len(sums), np.float32), np.zeros(3 * width, np.float32)
    expected = np.broadcast_to(1 / (1 + 2.0 ** -exponents.repeat(2)[:, None]), (len(sums), width))
    found = kernels.softmax_attention(sums, row_scales, bias, 2, 1)
    check_close(found, expected, 4e-6 * expected, "softmax_attention to two keys")


CASES: list[Callable[[CKernels], None]] = [
    pack,
    layer_norm_pack,
    linear,
    linear_to_bits,
    prototype_attention,
    linear_attention,
    project_and_attend,
    project_and_transform,
    quantize,
    quantize_halves,
    quantize_extremes,
    layer_norm_quantize,
    gelu_quantize,
    gelu,
    rescale,
    softmax_attention,
    softmax_attention_exact,
    softmax_attention_powers,
]
CASES_FOR_C = [*CASES, linear_in_place]
