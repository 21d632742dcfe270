"""Both C sources under sanitizers, with the sizes of the tests and random ones; and that a wrong bound does not pass there."""

import re
from pathlib import Path

import pytest

from tests import kernel_cases, sanitizers
from tests.sanitizers import FINDINGS, SOURCES, Sanitizer, find_sanitizer

RANDOM_CASES = 250
SCALAR_ONLY = [("#if defined(__x86_64__)", "#if 0"), ("#elif defined(__aarch64__)", "#elif 0")]  # compiles in a few seconds
MUTANTS = {  # library, file, what is there, what is wrong with it, what the report says
    "a row of weights too many": (
        *("kernels", "path.h", "for (int64_t word = 0; word < product->words; ++word)"),
        *("for (int64_t word = 0; word <= product->words; ++word)", "heap-buffer-overflow"),
    ),
    "a word of bits written too many": (
        *("kernels", "path.h", "for (int64_t word = 0; word < words; ++word)"),
        *("for (int64_t word = 0; word <= words; ++word)", "heap-buffer-overflow"),
    ),
    "a sign shifted as a number": (
        *("kernels", "path.h", "(uint32_t)(values[j] - thresholds[j] >= 0) << j"),
        *("(values[j] - thresholds[j] >= 0) << j", "runtime error: left shift of 1 by 31 places"),
    ),
    "a channel read too many": (
        *("scan", "scan_path.h", "memcpy(&v, from, count < LANES ? 4 * (size_t)count : sizeof v);"),
        *("memcpy(&v, from, count < LANES ? 4 * (size_t)count + 4 : sizeof v);", "heap-buffer-overflow"),
    ),
    "a channel written too many": (
        *("scan", "scan_path.h", "memcpy(to, &v, count < LANES ? 4 * (size_t)count : sizeof v);"),
        *("memcpy(to, &v, count < LANES ? 4 * (size_t)count + 4 : sizeof v);", "heap-buffer-overflow"),
    ),
    "one chunk too few kept": (
        *("scan", "scan_kernel.c", "return chunks_of(length) * states * padded_of(channels);"),
        *("return (chunks_of(length) - 1) * states * padded_of(channels);", "heap-buffer-overflow"),
    ),
}


@pytest.fixture(scope="module")
def sanitizer() -> Sanitizer:
    """The compiler with its sanitizers."""
    found, reason = find_sanitizer()
    if found is None:
        pytest.skip(reason)
    return found


def changed_sources(name: str, folder: Path, changes: dict[str, list[tuple[str, str]]]) -> list[Path]:
    """Copies of a library's sources, some with other text."""
    folder.mkdir()
    copies = []
    for source in SOURCES[name]:
        text = source.read_text()
        for old, new in changes.get(source.name, []):
            assert old in text, old
            text = text.replace(old, new)
        copies.append(folder / source.name)
        copies[-1].write_text(text)
    return copies


def test_sanitizers_find_nothing(sanitizer, tmp_path):
    libraries = {name: sanitizer.compile(name, tmp_path) for name in SOURCES}
    done = sanitizer.run(libraries, "--count", str(RANDOM_CASES), "--seed", "8")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"no findings, seed 8, kernels on .*, scan on .*: \d+ calls: .*\n", done.stdout)
    calls = {name: int(count) for name, count in re.findall(r"(\w+) (\d+)(?:,|\n)", done.stdout.split("calls: ")[1])}
    exported = re.findall(r"^(?:void|int) binaryad_(\w+)\([^)]*\*", SOURCES["kernels"][0].read_text(), re.MULTILINE)
    needed = {*exported, "selective_scan"} - {"softmax_attention"}  # only some processors have it
    assert needed <= calls.keys()
    assert all(calls[name] >= 50 for name in needed), calls


@pytest.mark.parametrize("what", MUTANTS)
def test_sanitizers_find_a_wrong_bound(sanitizer, tmp_path, what):
    name, file, old, new, report = MUTANTS[what]
    changes = {SOURCES[name][0].name: list(SCALAR_ONLY)}
    if name == "scan":  # has no path for ARM, and each block of paths begins alike
        changes = {SOURCES[name][0].name: SCALAR_ONLY[:1]}
    changes[file] = [*changes.get(file, []), (old, new)]
    library = sanitizer.compile(name, tmp_path / "cache", changed_sources(name, tmp_path / "sources", changes))
    done = sanitizer.run({name: library})
    assert done.returncode != 0
    assert report in done.stderr
    assert any(finding in done.stderr for finding in FINDINGS)
    assert "no findings" not in done.stdout


def test_a_wrong_result_is_no_pass(sanitizer, tmp_path):
    changes = {"scan_path.h": [("of_drive * b.step[v][t] + b.skip[v]", "of_drive * b.step[v][t] - b.skip[v]")]}
    changes["scan_kernel.c"] = SCALAR_ONLY[:1]
    library = sanitizer.compile("scan", tmp_path / "cache", changed_sources("scan", tmp_path / "sources", changes))
    done = sanitizer.run({"scan": library})
    assert done.returncode == 1
    assert "inputs is off by" in done.stderr


def test_random_sizes_repeat_with_their_seed():
    first, second = (list(_sizes(seed)) for seed in (3, 3))
    assert first == second != list(_sizes(4))
    for sizes in first:
        assert sizes.keys() <= vars(kernel_cases).keys()


def _sizes(seed: int):
    random = sanitizers.np.random.default_rng(seed)
    return (sanitizers.random_sizes(random) for _ in range(5))


@pytest.mark.parametrize("missing", ["compiler", "sanitizer"])
def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "")
    if missing == "sanitizer":
        compiler = tmp_path / "cc"
        compiler.write_text("#!/bin/sh\necho libasan.so\n")
        compiler.chmod(0o700)
    assert sanitizers.main(["--random", "1"]) == 2
    sentence = {"compiler": "there is no C compiler", "sanitizer": "has no address sanitizer (libasan.so)"}[missing]
    assert capsys.readouterr().err.strip().endswith(sentence)
