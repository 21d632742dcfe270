"""The packed file format against a reader and a writer of its own, and every way in which a file can be wrong."""

import hashlib
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch

from binarize.linear import BinarizationOptions, BinaryLinear
from binarize.packed import from_bytes, read_file, to_bytes
from binarize.stages import binarize, calibrate, scale_parameters
from common.errors import UserError
from utils.agreement import packed_copy
from utils.packed_model import PackingOptions, packed_bytes

# the format's types by their names in the header and in "compressed"; bfloat16 as its 16 bits
HEADER_TYPES = {"I8": "i1", "U8": "u1", "I16": "<i2", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "I32": "<i4", "I64": "<i8"}
STREAM_TYPES = {"int8": "i1", "uint8": "u1", "int16": "<i2", "float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
ZEROS = b"0" * 64
MEGABYTE = 2**20


def plain_parts(content: bytes) -> tuple[dict, dict, bytes]:
    """Tensors of the header, our entry in its metadata, and what follows the header."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    (key, entry), *others = header.pop("__metadata__").items()
    assert (key, others) == ("binaryad", [])
    return header, json.loads(entry), content[8 + length :]


def plain_read(content: bytes) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and description by the description of the format alone; the hash is checked."""
    header, entry, data = plain_parts(content)
    digest = entry["sha256"].encode()
    assert hashlib.sha256(content.replace(digest, ZEROS)).hexdigest().encode() == digest
    arrays = {}
    for name, place in header.items():
        start, stop = place["data_offsets"]
        arrays[name] = np.frombuffer(data[start:stop], HEADER_TYPES[place["dtype"]]).reshape(place["shape"])
    for name, kind in entry["compressed"].items():
        assert (arrays[name].dtype, arrays[name].ndim) == (np.uint8, 1)
        plain = zlib.decompress(arrays[name].tobytes())
        arrays[name] = np.frombuffer(plain, STREAM_TYPES[kind["dtype"]]).reshape(kind["shape"])
    return arrays, entry


def plain_write(header: dict, entry: dict, data: bytes) -> bytes:
    """A file with the right hash, whatever else may be wrong with it."""
    metadata = {"__metadata__": {"binaryad": json.dumps({**entry, "sha256": ZEROS.decode()})}}
    text = json.dumps({**metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + data
    return content.replace(ZEROS, hashlib.sha256(content).hexdigest().encode(), 1)


def rewritten(content: bytes, change: Callable[[dict, dict], None]) -> bytes:
    """The file after `change(header, entry)`, with the right hash."""
    header, entry, data = plain_parts(content)
    change(header, entry)
    return plain_write(header, entry, data)


def trained_like(detector, stage: int, activation_bits: int = 1, sab: str = "mixed"):
    """Binarize and calibrate a detector, move every trained tensor from its first value, make a quarter of alphas negative."""
    generator = torch.Generator().manual_seed(1)
    binarize(detector, stage, BinarizationOptions(activation_bits, sab))
    side = detector.encoder.vit.patch_embed.img_size[0]
    with torch.no_grad():
        for parameter in detector.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        calibrate(detector, torch.randn(4, 3, side, side, generator=generator))
        for parameter in scale_parameters(detector):
            parameter += 0.3 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
        for layer in detector.modules():
            if isinstance(layer, BinaryLinear):
                layer.alpha *= torch.where(torch.rand(layer.alpha.shape, generator=generator) < 0.25, -1, 1)
    return detector.eval()


def refusal(content: bytes) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(UserError) as refused:
        from_bytes(content, "part.binaryad")
    assert "'part.binaryad'" in str(refused.value)
    return str(refused.value)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(kind: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bits at all, not-a-number included."""
    generator = torch.Generator().manual_seed(len(shape))
    values = torch.randint(0, 256, (*shape, kind.itemsize), dtype=torch.uint8, generator=generator)
    return values.flatten().view(kind).reshape(shape) if values.numel() else torch.empty(shape, dtype=kind)


@pytest.fixture
def small_file() -> bytes:
    """A file of two tensors, one of them compressed."""
    return to_bytes({"codes": torch.zeros(40, dtype=torch.int8), "scale": torch.arange(3.0)}, {"item": "bottle"})


STORED = [torch.int8, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64]
SHAPES = [(), (0,), (1,), (7,), (0, 5), (5, 0), (3, 5), (7, 1, 9), (2, 3, 1, 5), (65, 33)]


@pytest.mark.parametrize("kind", STORED)
def test_every_type_and_shape_comes_back_and_is_read_by_others(kind):
    tensors = {}
    for shape in SHAPES:
        tensors[f"random {shape}"] = random_tensor(kind, shape)
        tensors[f"constant {shape}"] = torch.full(shape, 3, dtype=kind)
    tensors["transposed"] = random_tensor(kind, (4, 6)).T
    content = to_bytes(tensors, {"item": "bottle"})
    found, _ = from_bytes(content, "")
    arrays, entry = plain_read(content)
    assert found.keys() == arrays.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert raw(found[name]) == raw(expected)
        assert (arrays[name].dtype.itemsize, arrays[name].shape) == (kind.itemsize, tuple(expected.shape))
        assert arrays[name].tobytes() == raw(expected)
    assert ("constant (65, 33)" in entry["compressed"]) == (kind in STORED[:6])
    assert "random (65, 33)" not in entry["compressed"]


def test_truth_values_come_back():
    found, _ = from_bytes(to_bytes({"calibrated": torch.ones(300, dtype=torch.bool)}, {}), "")
    assert torch.equal(found["calibrated"], torch.ones(300, dtype=torch.bool))


def test_description_comes_back():
    description = {"item": 'bräcket "1"\n\udc80', "limits": [1, 2.5, None, True], "nested": {"sha256": "a" * 64}}
    content = to_bytes({}, description)
    tensors, found = from_bytes(content, "")
    assert tensors == {}
    assert found.items() >= description.items()
    _, entry = plain_read(content)
    assert entry.items() >= {**description, "format_version": 1, "compressed": {}}.items()


def test_compression_makes_the_file_smaller_and_never_larger():
    typical = (20 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))).round().clamp(-127, 127).to(torch.int8)
    assert len(to_bytes({"weight": typical}, {})) < 0.9 * typical.nbytes
    noise = random_tensor(torch.uint8, (64, 1000))
    assert len(to_bytes({"weight": noise}, {})) < noise.nbytes + 400


def test_equal_models_are_equal_files():
    def tensors():
        return {f"layer {index}": torch.full((index,), index % 100, dtype=torch.int8) for index in range(1, 60)}

    assert len({to_bytes(tensors(), {"item": "bottle", "stage": 2}) for _ in range(8)}) == 1


def test_weights_in_the_file_are_the_signs_of_the_trained_ones(tiny_detector):
    trained_like(tiny_detector, 2)
    signs = {}
    for name, layer in tiny_detector.named_modules():
        if isinstance(layer, BinaryLinear):
            weight = layer.weight.detach().numpy().astype(np.float64)
            signs[f"{name.replace('.attn', '')}.bits"] = weight >= weight.mean(axis=1, keepdims=True)
    assert len(signs) == 8 * 5
    options = PackingOptions("int8", "int8")
    arrays, entry = plain_read(packed_bytes(packed_copy(tiny_detector, options), options, {"item": "bottle"}))
    assert entry["precision"] == {"encoder": "int8", "trained": "int8", "encoder_reference": False}
    assert {name for name in arrays if name.endswith(".bits")} == signs.keys()
    for name, expected in signs.items():
        rows, columns = expected.shape
        assert (arrays[name].dtype, arrays[name].shape) == (np.uint8, (rows, columns // 8))
        for column in range(columns):
            byte, bit = divmod(column, 8)
            np.testing.assert_array_equal(arrays[name][:, byte] >> bit & 1, expected[:, column])


def test_every_flipped_bit_is_noticed(small_file):
    header_end = 8 + struct.unpack("<Q", small_file[:8])[0]
    marker = range(8, 8 + len(b'{"__metadata__":{"binaryad":'))
    version = small_file.index(b'format_version\\": 1') + len(b'format_version\\": ')
    for position in range(len(small_file)):
        for bit in range(8):
            changed = bytearray(small_file)
            changed[position] ^= 1 << bit
            message = refusal(bytes(changed))
            if position >= header_end:
                assert "does not match its own sha256" in message
            elif position in marker:
                assert message.startswith(("model damaged", "not a packed model"))
            elif position == version:
                assert message.startswith(("model damaged", "model too new"))
            else:
                assert message.startswith("model damaged")


def test_every_truncation_is_noticed(small_file):
    header_end = 8 + struct.unpack("<Q", small_file[:8])[0]
    for length in range(len(small_file)):
        message = refusal(small_file[:length])
        if length == 0:
            assert "is empty" in message
        elif length < 9:
            assert message.startswith("not a packed model")
        elif length < header_end:
            assert "ends within its header" in message
        else:
            assert f"has {length} bytes of {len(small_file)}" in message


def test_more_bytes_than_there_should_be(small_file):
    assert "does not match its own sha256" in refusal(small_file + b"\0")
    assert "does not match its own sha256" in refusal(small_file + small_file)


def test_files_of_other_kinds(tmp_path):
    for path in (tmp_path / "absent.binaryad", tmp_path):
        with pytest.raises(UserError, match="model not found"):
            read_file(path)
    for content in (b"<!DOCTYPE html><html>404</html>" * 99, b"item,score\n" * 99, b"{}", b"\0" * 4096, bytes(range(256)) * 9):
        assert "is no BinaryAD file" in refusal(content)
    for metadata in (None, {"format": "pt"}, {"binaryad": "7"}, {"binaryad": "{}"}, {"binaryad": "no JSON"}):
        message = refusal(safetensors.torch.save({"weight": torch.ones(9)}, metadata))
        assert message.startswith("model damaged" if metadata and "binaryad" in metadata else "not a packed model")
    checkpoint = tmp_path / "model.pth"
    torch.save({"weight": torch.ones(9)}, checkpoint)
    with pytest.raises(UserError, match=r"training checkpoint.*scripts\.export") as refused:
        read_file(checkpoint)
    assert repr(str(checkpoint)) in str(refused.value)


def test_newer_format_is_told_from_damage(small_file):
    newer = rewritten(small_file, lambda header, entry: entry.update(format_version=2))
    assert "has format 2, this program reads up to 1; update the program" in refusal(newer)
    for version in (None, "1", 0, -1, [1]):
        message = refusal(rewritten(small_file, lambda header, entry, version=version: entry.update(format_version=version)))
        assert message.startswith("model unusable")


def test_rewriting_alone_changes_nothing(small_file):
    assert rewritten(small_file, lambda header, entry: None) == small_file


@pytest.mark.parametrize("length", [100_000_001, 2**40, 2**63, 2**64 - 1])
def test_enormous_header_length(small_file, length):
    assert refusal(struct.pack("<Q", length) + small_file[8:]).startswith("model damaged")
    assert refusal(struct.pack("<Q", length) + b"{" + b" " * 99).startswith("not a packed model")


STREAM = zlib.compress(bytes(1000))
SIZE = len(STREAM)
PLACE = {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}
KIND = {"dtype": "int8", "shape": [1000]}
WRONG_SHAPES = [[999], [1001], [2**40], [2**62], [10**30], [-1000], [-10, -100], [0], ["1000"], [1000.0], "abc", None, 7, [[7]]]
WRONG_KINDS = [
    *({**KIND, "shape": shape} for shape in WRONG_SHAPES),
    *({**KIND, "dtype": name} for name in ("int16", "int64", "object", None, ["int8"])),
    *({"dtype": "int8"}, {**KIND, "more": 1}, "int8", None),
]
WRONG_OFFSETS = [[0, str(SIZE)], [0, None], [0], [], None, SIZE, [0, -1], [1, SIZE], [0, 1.5], [0, float("inf")]]
WRONG_PLACES = [
    *({**PLACE, "data_offsets": offsets} for offsets in WRONG_OFFSETS),
    *({**PLACE, "shape": shape} for shape in ([2**62, 2**62], [5], [-SIZE], [str(SIZE)], None)),
    *({**PLACE, "dtype": name} for name in ("X8", "F32", "F8_E8M0", None)),
    *({**PLACE, "dtype": "F4", "shape": [2 * SIZE]}, "no mapping"),
]


def test_a_stream_that_is_right_is_read():
    content = plain_write({"a": PLACE}, {"format_version": 1, "compressed": {"a": KIND}}, STREAM)
    assert torch.equal(from_bytes(content, "")[0]["a"], torch.zeros(1000, dtype=torch.int8))


@pytest.mark.parametrize("compressed", [*({"a": kind} for kind in WRONG_KINDS), {"absent": KIND}, ["a"], "a", None, 3])
def test_stream_that_is_not_what_the_header_says(compressed):
    content = plain_write({"a": PLACE}, {"format_version": 1, "compressed": compressed}, STREAM)
    assert memory_peak(lambda: refusal(content)) < MEGABYTE
    assert refusal(content).startswith("model unusable")


@pytest.mark.parametrize("place", WRONG_PLACES)
def test_header_that_makes_no_sense(place):
    content = plain_write({"a": place}, {"format_version": 1, "compressed": {}}, STREAM)
    assert memory_peak(lambda: refusal(content)) < MEGABYTE
    assert refusal(content).startswith(("model unusable", "model damaged"))


def test_stream_that_swells_is_stopped_at_the_declared_size():
    bomb = zlib.compress(bytes(64 * MEGABYTE), 9)
    place = {"dtype": "U8", "shape": [len(bomb)], "data_offsets": [0, len(bomb)]}
    entry = {"format_version": 1, "compressed": {"a": {"dtype": "int8", "shape": [1000]}}}
    content = plain_write({"a": place}, entry, bomb)
    assert memory_peak(lambda: refusal(content)) < MEGABYTE
    assert "1001 bytes instead of 1000" in refusal(content)


def test_side_below_zero_hides_no_other_stream():
    bomb = zlib.compress(bytes(64 * MEGABYTE), 9)
    places = {
        "a": {"dtype": "U8", "shape": [len(bomb)], "data_offsets": [0, len(bomb)]},
        "b": {"dtype": "U8", "shape": [0], "data_offsets": [len(bomb), len(bomb)]},
    }
    compressed = {name: {"dtype": "int8", "shape": [size]} for name, size in (("a", 64 * MEGABYTE), ("b", -64 * MEGABYTE))}
    content = plain_write(places, {"format_version": 1, "compressed": compressed}, bomb)
    assert memory_peak(lambda: refusal(content)) < MEGABYTE
    assert "shape [-" in refusal(content)


def memory_peak(work: Callable[[], object]) -> int:
    """Bytes that Python objects took at most while working."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
