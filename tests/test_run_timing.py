"""`scripts.report --measure`: which models are timed, in which form, and where the milliseconds end up."""

import json
import shutil

import torch

from binarize.linear import BinaryLinear
from scripts import report
from tests.conftest import run_folder
from tests.miniature import make_mvtec
from utils import run_timing


def test_every_network_is_timed_once_in_the_form_it_is_deployed_in(tmp_path, train, monkeypatch):
    data = make_mvtec(tmp_path / "data")
    assert train("--clb_stage", "0", "--total_iters", "2", data=data) == 0
    assert train("--clb_stage", "1", "--total_iters", "2", data=data) == 0
    float_run, binary = run_folder(tmp_path, "INP-Former-Single-Class-FP"), run_folder(tmp_path)
    copy = shutil.copytree(binary, tmp_path / "elsewhere" / binary.name)
    maps, measured, packed = [], [], []
    pack = run_timing.packed_copy

    def recorded(detector, options):
        packed.append(
            (any(isinstance(module, BinaryLinear) for module in detector.modules()), options.encoder, options.trained)
        )
        return pack(detector, options)

    def medians(variants, repeats):
        measured.append((len(variants), repeats, torch.get_num_threads()))
        maps.extend(call() for call in variants.values())
        return {name: 0.25 if name[0] == 0 else 0.125 for name in variants}

    monkeypatch.setattr(run_timing, "packed_copy", recorded)
    monkeypatch.setattr(run_timing, "interleaved_medians", medians)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    flags = ["--measure", "--repeats", "3", "--html", str(tmp_path / "page.html")]
    assert report.main([*map(str, (float_run, binary, copy, tmp_path / "absent")), *flags]) == 0
    assert measured == [(2, 3, 1)]
    assert packed == [(True, "int8", "int8")]  # the binary network alone
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert [tuple(anomaly_map.shape) for anomaly_map in maps] == [(1, 56, 56)] * 2
    stored = [json.loads((folder / "timing.json").read_text()) for folder in (float_run, binary, copy)]
    assert [(timing["milliseconds"], timing["engine"]) for timing in stored] == [
        (250.0, "torch float32"),
        (125.0, "1-bit engine, int8 encoder"),
        (125.0, "1-bit engine, int8 encoder"),
    ]
    assert all(timing["machine"] and timing["date"] for timing in stored)
    assert "<td>125.0</td>" in (tmp_path / "page.html").read_text()


def test_without_a_model_nothing_can_be_timed(tmp_path, train, capsys):
    assert train("--clb_stage", "0", "--total_iters", "2", data=make_mvtec(tmp_path / "data")) == 0
    folder = run_folder(tmp_path, "INP-Former-Single-Class-FP")
    (folder / "bottle" / "model.pth").unlink()
    assert report.main([str(folder), "--measure", "--html", str(tmp_path / "page.html")]) == 2
    assert "none of the runs has a trained model" in capsys.readouterr().err
