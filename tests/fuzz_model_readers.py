"""Readers of models, weights, caches and compiled code, for the fuzzer; everything is as small as it can be."""

import ctypes
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from binarize.linear import BinaryLinear
from binarize.stages import calibrate
from common.c_library import CACHE_VARIABLE, open_library
from common.errors import NumericError, UserError
from datasets.records import ImageDataset, Record
from models.build import RANDOM_TINY_ENCODER
from models.detector import Detector
from models.efficientad import EfficientAD
from models.encoder import load_encoder_weights, read_weights_file
from models.feature_sources import EfficientNetLiteMaps, build_feature_source
from models.patch_description import TEACHER_CHANNELS, PatchDescriptionNetwork
from models.teacher import build_teacher
from models.weight_files import state_sha256
from tests.fuzz_engine import Reader
from tests.miniature import save, texture
from tests.raad_models import detector_of
from tests.test_encoder import SIDE as GRID
from tests.test_encoder import facebook_state, small_vit
from tests.test_packed import rewritten
from tests.test_raad_packed import write as write_quantized
from utils.agreement import packed_copy
from utils.arguments import base_parser, parse
from utils.categories import ModelData
from utils.checkpoint import save_checkpoint
from utils.detectors import description, open_checkpoint, restore_detector
from utils.distillation_data import DistillationOptions
from utils.export import ThresholdOptions, export_packed, transform_of
from utils.feature_cache import cache_features
from utils.hosts import HOSTS
from utils.image_cache import cache_images
from utils.packed_model import PackingOptions, describe, packed_bytes
from utils.prediction import Predictor
from utils.result_files import MetricsLog
from utils.settings import PROTOCOL_KEYS, Settings, settings_of
from utils.teacher_distillation import Distillation
from utils.training import fit

CROP = 56
# flags of a model of every host, and its stage
MODELS = {
    "INP-Former": (1, ("--encoder", RANDOM_TINY_ENCODER, "--clb_stage", "1")),
    "Dinomaly": (1, ("--encoder", RANDOM_TINY_ENCODER, "--clb_stage", "1", "--decoder_attention", "softmax")),
    "VarAD": (1, ("--encoder", RANDOM_TINY_ENCODER, "--clb_stage", "1", "--load_checkpoint", "before")),
    "RAAD": (0, ("--encoder", "pdn_tiny", "--clb_stage", "0")),
}
DECISION = {"threshold": 0.5, "quantile": 0.99, "margin": 1.0, "images": 3, "source": "a test"}
PRECISIONS = {"INP-Former": ("int8", "int8"), "Dinomaly": ("bf16", "fp16"), "VarAD": ("fp32", "fp32")}
CALIBRATION = {"map_median": 0.25, "map_limit": 1.0, "map_threshold": 0.75, "scores": [0.125, 0.25, 0.5]}


@cache
def settings_for(host: str) -> Settings:
    """A tiny command of a host."""
    side = {"RAAD": 64, "VarAD": 70}.get(host, CROP)
    flags = ["--dataset", "Folder", "--data_path", "data", "--input_size", str(max(64, side)), "--crop_size", str(side)]
    flags += ["--device", "cpu", "--num_workers", "0", "--total_iters", "2", "--batch_size", "2"]
    return settings_of(parse(base_parser("", HOSTS[host], ["single"]), [*flags, *MODELS[host][1]]))


@cache
def encoder_for(host: str) -> torch.nn.Module:
    """The frozen part of a host's model."""
    if host == "RAAD":
        return build_teacher("tiny", "random")
    return HOSTS[host].build_encoder(RANDOM_TINY_ENCODER, settings_for(host).data.crop_size, None, "paper")


def expected_of(host: str) -> dict:
    """What the command expects of its checkpoint."""
    return description(settings_for(host), ModelData("bottle", [], True, 1), encoder_for(host), host)


def noise(host: str, count: int = 2) -> torch.Tensor:
    """Images."""
    side = settings_for(host).data.crop_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def fresh(host: str, variant: int = 0) -> Detector:
    """A detector in the form of its stage."""
    torch.manual_seed(variant)
    settings = settings_for(host)
    detector = HOSTS[host].build(encoder_for(host), settings.config)
    HOSTS[host].convert(detector, MODELS[host][0], settings.config, {})
    return detector


def detector_for(host: str, variant: int = 0) -> Detector:
    """The same with values as a training might leave them."""
    detector = fresh(host, variant)
    if any(isinstance(module, BinaryLinear) for module in detector.modules()):
        calibrate(detector, noise(host))
    detector.prepare(lambda: [noise(host)])
    detector.calibrate([noise(host)])
    return detector.eval()


def content_for(host: str, variant: int = 0) -> dict:
    """Content of a host's `model.pth`."""
    settings = settings_for(host)
    protocol = {key: settings.config[key] for key in PROTOCOL_KEYS}
    state = detector_for(host, variant).trained_state()
    return {"model": state, **expected_of(host), "calibration": CALIBRATION, "protocol": protocol}


def make_checkpoint(host: str, folder: Path, variant: int) -> Path:
    save_checkpoint(folder / "model.pth", content_for(host, variant))
    return folder / "model.pth"


@torch.no_grad()
def start_from(host: str, path: Path) -> dict:
    """As a training that starts from a model does."""
    content = open_checkpoint(path, expected_of(host), (MODELS[host][0],), "--load_checkpoint")
    detector = restore_detector(content, path, encoder_for(host), HOSTS[host]).eval()
    return {"state": dict(detector.trained_state()), "map": detector.anomaly_map(noise(host))}


def has_right_map(value: dict, original: dict) -> None:
    assert value["map"].shape == original["map"].shape
    assert value["map"].dtype == torch.float32


def export(path: Path) -> bytes:
    """As scripts.export does."""
    output = path.with_name("model.binaryad")
    output.unlink(missing_ok=True)
    export_packed(path, output, PackingOptions("fp32", "fp32"), ThresholdOptions(), None)
    return output.read_bytes()


def train(host: str, detector: Detector, folder: Path, iterations: int) -> dict:
    """Train up to a number of iterations out of two on four images, going on from a last.pth; returns what was trained."""
    settings = settings_for(host)
    HOSTS[host].prepare_training(detector.train(), settings.config)
    images = [{"image": image, "path": f"{number}.png"} for number, image in enumerate(noise(host, 4))]
    identity = {**expected_of(host), "image_count": 4, "total_iterations": 2, "features": "not cached"}
    options = replace(settings.training_for("bottle", 4), total_iterations=iterations)
    fit(detector, images, options, folder, identity, MetricsLog(folder / "metrics.jsonl", "bottle"), resume=True)
    return {"state": dict(detector.trained_state())}


def make_last(host: str, folder: Path, variant: int) -> Path:
    train(host, detector_for(host, variant), folder, 1)
    return folder / "last.pth"


def resume(host: str, path: Path) -> dict:
    """As a training that goes on from its last.pth does."""
    return train(host, fresh(host), path.parent, 2)


class Source(torch.nn.Module):
    """Stands for the network whose features a teacher learns."""

    name, source, weights_sha256 = "tiny source", "a test", "0" * 64


def distillation(folder: Path) -> Distillation:
    images = {Path(f"{number}.png"): Path(f"{number}.png") for number in range(4)}
    options = DistillationOptions("tiny", batch_size=2, image_size=64)
    return Distillation(Source(), images, options, folder / "teacher.safetensors", torch.device("cpu"))


def make_distillation(folder: Path, variant: int) -> Path:
    work = distillation(folder)
    generator = torch.Generator().manual_seed(variant)
    work.statistics.add(torch.randn(2, TEACHER_CHANNELS["tiny"], 8, 8, generator=generator))
    loss = work.network(torch.randn(2, 3, 64, 64, generator=generator)).square().mean()
    loss.backward()
    work.optimizer.step()
    work.iteration, work.losses = 1, [loss.item()]
    work.save()
    return work.state_file


def resume_distillation(path: Path) -> dict:
    """As scripts.distill_teacher does."""
    work = distillation(path.parent)
    work.restore()
    mean, std = work.statistics.mean_and_std()
    return {
        "network": dict(work.network.state_dict()),
        "optimizer": work.optimizer.state_dict(),
        "statistics": [mean, std, work.statistics.images, work.statistics.pixels],
        "progress": [work.iteration, work.recent_loss],
    }


def make_packed(host: str, folder: Path, variant: int) -> Path:
    options, content = PackingOptions(*PRECISIONS[host]), content_for(host, variant)
    packed = packed_copy(detector_for(host, variant), options)
    path = folder / "model.binaryad"
    path.write_bytes(packed_bytes(packed, options, describe(packed, content, DECISION, transform_of(content))))
    return path


@cache
def quantized() -> EfficientAD:
    """A RAAD of several numbers of bits."""
    return detector_of((8, 4, 2, 8))


def make_quantized(folder: Path, variant: int) -> Path:
    """A quantized RAAD; its file gets what the trained model would add, and in the second variant another threshold."""
    path, _ = write_quantized(quantized(), folder)
    content = content_for("RAAD")

    def complete(header: dict, entry: dict) -> None:
        entry["preprocessing"], entry["protocol"] = transform_of(content), content["protocol"]
        entry["decision"] = {**DECISION, "threshold": 0.5 + variant}

    path.write_bytes(rewritten(path.read_bytes(), complete))
    return path


def predict(path: Path) -> dict:
    """As scripts.predict does for one image."""
    predictor = Predictor.load(path)
    prediction = predictor(texture(np.random.default_rng(0)))
    return {"map": torch.from_numpy(prediction.map), "score": prediction.score, "verdict": prediction.verdict}


def tensor_file(make_state: Callable[[int], dict], suffix: str, folder: Path, variant: int, **metadata: str) -> Path:
    """A state dict as .safetensors or .pth."""
    path, state = folder / f"weights{suffix}", make_state(variant)
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path, {"source": "a test", **metadata})
    else:
        torch.save(state, path)
    return path


def make_sealed_teacher(folder: Path, variant: int) -> Path:
    """As scripts.distill_teacher writes it, with the hash of its tensors."""
    return tensor_file(teacher_state, ".safetensors", folder, variant, sha256=state_sha256(teacher_state(variant)))


def make_neighbour(folder: Path, variant: int) -> Path:
    """The hash beside a file of weights, as sha256sum writes it."""
    path = tensor_file(teacher_state, ".pth", folder, variant)
    neighbour = path.with_name(f"{path.name}.sha256")
    neighbour.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    return neighbour


def encoder_state(variant: int) -> dict:
    return {name: value + variant for name, value in facebook_state().items()}


@torch.no_grad()
def encoder_weights(path: Path) -> dict:
    """As building an encoder with --encoder_weights does; the ViT is a small one."""
    state, _ = read_weights_file(path)
    vit = small_vit()
    sha256 = load_encoder_weights(vit, state, GRID, "paper", repr(str(path)))
    return {"state": dict(vit.state_dict()), "sha256": sha256}


def teacher_state(variant: int) -> dict:
    torch.manual_seed(variant)
    return dict(PatchDescriptionNetwork("tiny", TEACHER_CHANNELS["tiny"]).state_dict())


def teacher_weights(path: Path) -> dict:
    """As building a teacher with --teacher_weights does."""
    teacher = build_teacher("tiny", str(path))
    return {"state": dict(teacher.network.state_dict()), "sha256": teacher.weights_sha256}


def source_state(variant: int) -> dict:
    torch.manual_seed(variant)
    return _of_floats(EfficientNetLiteMaps())


def source_weights(path: Path) -> dict:
    """As the distillation of a teacher with --source FILE does."""
    source = build_feature_source(str(path), TEACHER_CHANNELS["tiny"], 64)
    return {"state": _of_floats(source.maps), "sha256": source.weights_sha256}


def _of_floats(network: torch.nn.Module) -> dict:
    return {name: value for name, value in network.state_dict().items() if value.is_floating_point()}


def is_usable_network(value: dict, original: dict) -> None:
    """Finite float32 weights of the right shapes, under a hash of their own."""
    assert value["state"].keys() == original["state"].keys()
    for name, tensor in value["state"].items():
        assert (tensor.shape, tensor.dtype) == (original["state"][name].shape, torch.float32), name
        assert tensor.isfinite().all(), f"{name} is not finite"
    assert value["sha256"] != original["sha256"], "other weights under the same hash"


def images_of(folder: Path, variant: int) -> ImageDataset:
    generator = np.random.default_rng(variant)
    paths = [folder / "data" / f"{number}.png" for number in range(3)]
    for path in paths:
        if not path.is_file():
            save(path, texture(generator))
    return ImageDataset([Record(path, 0, "bottle") for path in paths], 64, CROP)


def features_of(folder: Path, variant: int = 0) -> np.ndarray:
    """As a training with --cache_features disk does."""
    encoder, images = encoder_for("INP-Former"), images_of(folder, variant)

    @torch.no_grad()
    def encode(batch: torch.Tensor) -> torch.Tensor:
        return torch.stack(encoder(batch), dim=1)

    data = cache_features(images, encode, {"encoder": "tiny"}, "disk", folder / "cache", 2, 0, "test")
    return np.stack([data.image(index).numpy() for index in range(len(data))])


def pixels_of(folder: Path, variant: int = 0) -> np.ndarray:
    """As a training with --cache_images disk does."""
    data = cache_images(images_of(folder, variant), "disk", folder / "cache", 0, "test")
    return np.stack([data.image(index).numpy() for index in range(len(data))])


def make_cache(fill: Callable[[Path, int], np.ndarray], folder: Path, variant: int) -> Path:
    fill(folder, variant)
    (path,) = (folder / "cache").glob("*.npy")
    return path


def make_library(folder: Path, variant: int) -> Path:
    source = folder / "toy.c"
    source.write_text(f"int answer(void) {{ return {42 + variant}; }}\n")
    os.environ[CACHE_VARIABLE] = str(folder / "cache")
    assert open_library("toy", [source], "toys") is not None
    (path,) = (folder / "cache").glob("toy-*.so")
    return path


def open_toy(path: Path) -> int:
    """As the C kernels are opened; in a new folder, for the linker knows a path again."""
    folder = Path(tempfile.mkdtemp(dir=path.parents[1]))
    for file in path.parent.iterdir():
        shutil.copy2(file, folder)
    os.environ[CACHE_VARIABLE] = str(folder)
    try:
        library = open_library("toy", [path.parents[1] / "toy.c"], "toys")
        assert library is not None
        library.answer.restype = ctypes.c_int
        return library.answer()
    finally:
        shutil.rmtree(folder)


def _reader(
    name: str, make: Callable, read: Callable, form: str = "checkpoint", check: Callable | None = None, **others
) -> Reader:
    """A reader of a file with a hash of its own."""
    further = {} if check is None else {"check": check}
    return Reader(name, make, read, form, sealed=True, refusals=(UserError, NumericError), **further, **others)


def _weights(kind: str, suffix: str, make_state: Callable[[int], dict], read: Callable[[Path], dict]) -> Reader:
    """A reader of weights, which have no hash: damaged ones are others, but usable."""
    form = "torch" if suffix == ".pth" else "safetensors"
    return Reader(f"{kind} weights {suffix}", partial(tensor_file, make_state, suffix), read, form, check=is_usable_network)


READERS = [
    *(
        _reader(f"model.pth {host}", partial(make_checkpoint, host), partial(start_from, host), check=has_right_map)
        for host in MODELS
    ),
    _reader("model.pth exported", partial(make_checkpoint, "VarAD"), export),
    *(_reader(f"last.pth {host}", partial(make_last, host), partial(resume, host)) for host in ("VarAD", "RAAD")),
    _reader("distillation state", make_distillation, resume_distillation),
    *(
        _reader(f"binaryad {host}", make, predict, "packed", has_right_map, names=("image 0",))
        for host, make in {**{host: partial(make_packed, host) for host in PRECISIONS}, "RAAD": make_quantized}.items()
    ),
    *(_weights("encoder", suffix, encoder_state, encoder_weights) for suffix in (".safetensors", ".pth")),
    *(_weights("teacher", suffix, teacher_state, teacher_weights) for suffix in (".safetensors", ".pth")),
    _weights("source", ".safetensors", source_state, source_weights),
    _reader("teacher weights with their hash", make_sealed_teacher, teacher_weights, "safetensors"),
    _reader("hash beside weights", make_neighbour, lambda path: teacher_weights(path.with_suffix("")), "lines"),
    _reader("feature cache", partial(make_cache, features_of), lambda path: features_of(path.parents[1]), "array"),
    _reader("image cache", partial(make_cache, pixels_of), lambda path: pixels_of(path.parents[1]), "array"),
    _reader("compiled library", make_library, open_toy, "bytes", programs=("cc", "gcc", "clang")),
]
