"""RAAD's quantization through its entry script: who gets how many bits, by every rule, and what fine-tuning then changes."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.efficientad import EfficientAD
from quantize.layers import quantized_layers, set_quantization
from tests.test_raad_runs import NAME, Runs, bits_of, make_runs
from tests.test_resume import assert_same
from utils import raad_quantization
from utils.detectors import load_detector

FAST = ("--rounding", "nearest", "--range_init", "minmax")  # where bits are all that matters
CHOICES = (2, 3, 4, 8)
# parameters of teacher and student together, by layer: 4 x 4, 4 x 4, 3 x 3 and 4 x 4 weights and the biases
PAIRS = [2 * 784, 2 * 8224, 2 * 9248, (16 * 32 * 48 + 48) + (16 * 32 * 96 + 96)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """A baseline alone."""
    runs = make_runs(tmp_path_factory.mktemp("raad"))
    assert runs.call("--stage", "baseline") == 0
    return runs


def trained(runs: Runs, name: str, *flags: str) -> tuple[dict, dict]:
    """The checkpoints of the quantized and of the fine-tuned model from the shared baseline; both are tested once more."""
    flags = ("--stage", "all", "--baseline", NAME, "--save_name", name, *flags)
    assert runs.call(*flags) == 0
    tables = [runs.folder(run) / "results.csv" for run in (f"{name}-Quantized", name)]
    before = [table.read_bytes() for table in tables]
    for table in tables:
        table.unlink()
    assert runs.call(*flags, "--phase", "test") == 0
    assert [table.read_bytes() for table in tables] == before
    return runs.model(f"{name}-Quantized"), runs.model(name)


def quantized(runs: Runs, name: str, *flags: str) -> dict:
    """The checkpoint of the quantized model alone."""
    assert runs.call("--stage", "quantize", "--baseline", NAME, "--save_name", name, *flags) == 0
    return runs.model(f"{name}-Quantized")


def effective_parameters(bits: list[int]) -> float:
    """Of teacher and student, biases with the bits of their layer."""
    return sum(count * of_layer for count, of_layer in zip(PAIRS, bits, strict=True)) / 32


def best_bits(values: dict[tuple[int, int], float], budget: float) -> tuple[int, int]:
    """The affordable bits of both layers between the ends with the largest value."""
    affordable = [inner for inner in values if effective_parameters([8, *inner, 8]) <= budget]
    return max(affordable, key=values.get)


def expected_bits(method: str, scores: list[float]) -> list[int]:
    """Bits of the layers between the ends for the flags of the test below."""
    if method == "random":
        generator = random.Random(1)
        return [generator.choice(CHOICES) for _ in range(2)]
    if method == "inverted":
        return [8, 3] if scores[1] < scores[2] else [3, 8]  # by rank, two layers get the second and the last choice
    if method in ("budget", "ompq"):
        theta = scores[1:3] if method == "budget" else [np.mean(scores[1:]), np.mean(scores[2:])]
        values = {inner: float(np.dot(theta, inner)) for inner in itertools.product(CHOICES, repeat=2)}
        return list(best_bits(values, 23_000))
    return {"uniform": [3, 3], "manual": [2, 4], "hawq": [2, 2]}[method]


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("uniform", ("--bits", "3")),
        ("manual", ("--bits", "2", "4")),
        ("random", ()),
        ("inverted", ("--hqs_phi", "rank")),
        ("budget", ("--budget", "23000")),
        ("ompq", ("--budget", "23000")),
        ("hawq", ("--budget", "21100")),
    ],
)
def test_every_allocation_trains_and_its_bits_are_where_they_should_be(runs, method, flags):
    before, after = trained(runs, method, "--allocation", method, *FAST, *flags)
    decision, size = before["quantization"]["allocation"], before["quantization"]["size"]
    bits = [8, *expected_bits(method, decision["scores"]), 8]
    assert decision["method"] == method
    for content in (before, after):
        assert bits_of(content["model"], "student") == bits_of(content["model"], "quantized_teacher") == bits
        assert bits_of(content["model"], "autoencoder") == []
    assert decision["student_bits"] == decision["teacher_bits"] == bits
    assert size["effective_teacher_student"] == effective_parameters(bits)


def test_all_layers_of_all_networks_have_the_same_bits_and_their_steps_are_learned(runs):
    flags = (
        "--allocation",
        "uniform",
        "--bits",
        "4",
        "--ends_bits",
        "4",
        "--autoencoder_bits",
        "4",
        *FAST,
        "--rounding",
        "lsq",
    )
    before, after = trained(runs, "lsq", *flags, "--finetune_learning_rate", "0.001")
    for content in (before, after):
        bits = [bits_of(content["model"], network) for network in ("quantized_teacher", "student", "autoencoder")]
        assert bits == [[4] * 4, [4] * 4, [4] * 14]
    assert before["quantization"]["size"]["effective_all"] == before["quantization"]["size"]["parameters"] / 8
    steps = [name for name in before["model"] if name.endswith(".log_step")]
    changed = {name for name in steps if not torch.equal(before["model"][name], after["model"][name])}
    learned = {name for name in steps if not name.startswith("quantized_teacher.")}
    assert changed >= {name for name in learned if name.startswith("student.") and "output_quantizer" not in name}
    assert [name for name in changed if name.startswith("autoencoder.")]  # some of its layers are dead so early
    assert changed <= learned


def test_a_student_alone_may_have_fewer_bits(runs):
    flags = ("--allocation", "manual", "--bits", "2", "3", "--share_bits", "student_only", *FAST)
    before, after = trained(runs, "student-only", *flags)
    for content in (before, after):
        assert bits_of(content["model"], "student") == [8, 2, 3, 8]
        assert bits_of(content["model"], "quantized_teacher") == [8] * 4


def test_the_control_without_quantization_goes_on_from_the_baseline(runs):
    assert runs.call("--stage", "all", "--baseline", NAME, "--save_name", "control", "--allocation", "none") == 0
    assert not runs.folder("control-Quantized").exists()
    config = runs.config("control")
    assert (config["load_checkpoint"], config["allocation"], config["rounding"]) == (f"{NAME}-Baseline", "none", None)
    baseline, control = runs.model(f"{NAME}-Baseline"), runs.model("control")
    assert baseline["model"].keys() == control["model"].keys()
    changed = {name for name, value in baseline["model"].items() if not torch.equal(value, control["model"][name])}
    assert changed == {name for name in baseline["model"] if not name.startswith("teacher_")}  # map_quantiles with the weights
    before = (runs.folder("control") / "results.csv").read_bytes()
    assert runs.call("--stage", "finetune", "--phase", "test", "--save_name", "control", "--allocation", "none") == 0
    assert (runs.folder("control") / "results.csv").read_bytes() == before


def test_flags_of_the_quantization_reach_the_layers(runs):
    flags = (
        "--output_bits",
        "0",
        "--range_init",
        "minmax",
        "--fisher",
        "none",
        "--no-bias_correction",
        "--rounding",
        "nearest",
    )
    plain = quantized(runs, "plain", *flags)
    assert not [name for name in plain["model"] if "output_quantizer" in name]
    assert plain["quantization"]["layer_errors"] == {"teacher": [], "student": []}
    baseline = runs.model(f"{NAME}-Baseline")["model"]
    for layer in range(1, 5):
        weight, bias = (baseline[f"student.conv{layer}.{kind}"] for kind in ("weight", "bias"))
        assert torch.equal(plain["model"][f"student.conv{layer}.bias"], bias)  # not corrected
        assert torch.equal(plain["model"][f"student.conv{layer}.weight"], weight)  # latent, not rounded
        low, high = weight.flatten(1).amin(dim=1).clamp_max(0), weight.flatten(1).amax(dim=1).clamp_min(0)
        bits = bits_of(plain["model"], "student")[layer - 1]
        expected = torch.maximum(-low / 128, high / 127) if bits == 8 else (high - low) / (2**bits - 1)
        step = plain["model"][f"student.conv{layer}.weight_quantizer.log_step"].exp()
        assert torch.allclose(step, expected, rtol=1e-5)
    others = {
        name: quantized(runs, name, *flags)
        for name, flags in {
            "corrected": ("--rounding", "nearest"),
            "unweighted": ("--fisher", "none"),
            "output": ("--fisher", "output"),
            "literal": ("--hqs_score", "mse_raw", "--hqs_input", "teacher", "--hqs_tap", "post", "--hqs_phi", "absolute"),
        }.items()
    }
    assert "student.conv1.output_quantizer.log_step" in others["corrected"]["model"]
    assert not torch.equal(others["corrected"]["model"]["student.conv2.bias"], baseline["student.conv2.bias"])
    rounded = [others[name]["model"]["student.conv3.bias"] for name in ("corrected", "unweighted", "output")]
    assert not any(torch.equal(first, second) for first, second in itertools.combinations(rounded, 2))
    scores = [content["quantization"]["allocation"]["scores"] for content in (others["output"], others["literal"])]
    assert all(first != second for first, second in zip(*scores, strict=True))


def on_grid(values: torch.Tensor, state: dict, quantizer: str) -> torch.Tensor:
    """Values after a quantizer of a checkpoint, in float64 from the definition."""
    bits = int(state[f"{quantizer}._extra_state"][0])
    step, zero = state[f"{quantizer}.log_step"].double().exp(), state[f"{quantizer}.zero_point"].double()
    if step.ndim:
        step, zero = step[:, None, None, None], zero[:, None, None, None]
    return step * ((values / step).round().add(zero).clamp(0, 2**bits - 1) - zero)


def test_finetuning_changes_the_weights_behind_quantizers_that_stay_on(runs):
    before, after = trained(runs, "ste", "--allocation", "manual", "--bits", "2", "3")
    first, second = before["model"], after["model"]
    same = {name for name, value in first.items() if torch.equal(value, second[name])}
    assert same >= {name for name in first if name.startswith(("quantized_teacher.", "teacher_")) or "quantizer." in name}
    trainable = {name for name in first if name.startswith(("student.", "autoencoder.")) and "quantizer." not in name}
    assert not same & trainable
    for layer in range(1, 5):  # the learned rounding's result is a latent weight; the fine-tuned one is not
        weight = f"student.conv{layer}.weight"
        rounded = on_grid(first[weight].double(), first, f"student.conv{layer}.weight_quantizer")
        assert torch.allclose(first[weight].double(), rounded, atol=1e-6)
        moved = second[weight].double() - on_grid(second[weight].double(), second, f"student.conv{layer}.weight_quantizer")
        assert moved.abs().max() > 1e-6

    detector, _ = load_detector(runs.folder("ste") / "bottle" / "model.pth", "random")
    assert isinstance(detector, EfficientAD)
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        found = detector.student(maps.float())
        for layer in range(1, 5):
            name = f"student.conv{layer}"
            maps = on_grid(maps, second, f"{name}.input_quantizer")
            weight = on_grid(second[f"{name}.weight"].double(), second, f"{name}.weight_quantizer")
            maps = F.conv2d(maps, weight, second[f"{name}.bias"].double())
            if layer < 4:
                maps = on_grid(F.relu(maps), second, f"{name}.output_quantizer")
            if layer < 3:
                maps = F.avg_pool2d(maps, 2)
        difference = (found - maps).abs()
        assert difference.median() < 1e-5  # single values may fall to the other side of a rounding
        assert difference.mean() < 0.02 * maps.abs().mean()
        assert len(quantized_layers(detector.student)) == 4
        set_quantization(detector.student, False)
        assert (detector.student(torch.randn(2, 3, 64, 64)) - found).abs().mean() > 0.05 * maps.abs().mean()


def test_the_cost_of_a_run_counts_the_bits_that_were_decided_in_it(runs):
    quantized(runs, "cost", "--allocation", "uniform", "--bits", "4", "--rounding", "nearest")
    saved = [
        json.loads((runs.folder(name) / "cost.json").read_text())["whole model"]["saved_bits"]
        for name in (f"{NAME}-Baseline", "cost-Quantized")
    ]
    ends, between = 2 * 4 * 4 * 3 * 16 + 4 * 4 * 32 * (48 + 96), 2 * (4 * 4 * 16 * 32 + 3 * 3 * 32 * 32)
    assert saved == [0, (32 - 8) * ends + (32 - 4) * between]


def test_layers_are_quantized_in_float32_whatever_the_training_computes_in(runs):
    models = [quantized(runs, name, "--precision", name)["model"] for name in ("fp32", "bf16")]
    for name, value in models[0].items():
        if "weight_quantizer" in name or name.endswith(".weight"):
            assert torch.equal(value, models[1][name]), name


def test_finetuning_as_float_starts_from_the_rounded_weights_and_stays_float(runs):
    before, after = trained(runs, "literal-float", "--rounding", "nearest", "--finetune", "float", "--finetune_iters", "1")
    assert bits_of(after["model"], "student") == []
    assert bits_of(after["model"], "quantized_teacher") == bits_of(before["model"], "student")
    for layer in range(1, 5):
        weight = f"student.conv{layer}.weight"
        rounded = on_grid(before["model"][weight].double(), before["model"], f"student.conv{layer}.weight_quantizer")
        moved = (after["model"][weight].double() - rounded).abs()  # one step of Adam, of at most about its learning rate
        assert 0 < moved.max() < 1.1e-5
    detector, _ = load_detector(runs.folder("literal-float") / "bottle" / "model.pth", None)  # the teacher of the training
    assert not quantized_layers(detector.student)
    assert len(quantized_layers(detector.teacher)) == 4


def test_steps_are_learned_behind_a_learned_rounding_if_that_is_wanted(runs):
    before, after = trained(runs, "steps", "--learn_steps", "--allocation", "uniform", "--bits", "4")
    names = [name for name in before["model"] if name.startswith("student.") and name.endswith(".log_step")]
    assert len(names) == 4 + 4 + 3
    assert not any(torch.equal(before["model"][name], after["model"][name]) for name in names)


def test_a_control_that_is_none_says_so(runs, capsys, monkeypatch):
    monkeypatch.setattr(raad_quantization, "layer_scores", lambda pairs, kind: [1.0, 1.0, 1.0, 1.0])
    quantized(runs, "same", "--allocation", "inverted", *FAST)
    assert "this control has the very bits of --allocation hqs" in capsys.readouterr().err
    monkeypatch.setattr(raad_quantization, "layer_scores", lambda pairs, kind: [1.0, 0.1, 3.0, 1.0])
    content = quantized(runs, "other", "--allocation", "inverted", *FAST)
    assert bits_of(content["model"], "student") == [8, 8, 2, 8]
    assert "very bits" not in capsys.readouterr().err


def test_what_is_decided_and_rounded_does_not_depend_on_chance(runs, monkeypatch):
    first = quantized(runs, "first", "--fisher", "task")
    decide = raad_quantization.decide_bits

    def decide_after_draws(*arguments):
        torch.rand(1000)  # as a loader of images draws its seed
        return decide(*arguments)

    monkeypatch.setattr(raad_quantization, "decide_bits", decide_after_draws)
    assert_same(quantized(runs, "second", "--fisher", "task")["model"], first["model"])
