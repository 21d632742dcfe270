"""Training of Dinomaly: loss, schedules, optimiser, dropout and initial weights against slow forms and the authors' numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import Binary_Dinomaly
import models.dinomaly
import utils.optim
from models.build import build_dinomaly, build_encoder_without_weights, published_parameter_count
from models.dinomaly import Dinomaly, DinomalyOptions, DinomalyTraining
from models.losses import hard_mining_loss
from tests.distributed_work import Noise
from tests.test_dinomaly import double, encoder_with_registers, normal, random_dinomaly, random_features, slow_target
from tests.test_inp_former import slow_distance
from tests.test_optim import gradients_of, slow_stable_adamw, starting_values, torch_result
from utils.optim import StableAdamW, learning_rate
from utils.result_files import MetricsLog
from utils.settings import Settings
from utils.training import TrainingOptions, fit


def mining_weights(distances: np.ndarray, share: float, factor: float) -> np.ndarray:
    """What the host's hook multiplies the gradient by, for distances (B, N)."""
    count = max(1, int(distances.size * (1 - share)))
    threshold = sorted(distances.ravel(), reverse=True)[count - 1]
    return np.where(distances < threshold, factor, 1.0)


def unweighted_loss(target: np.ndarray, rebuilt: np.ndarray) -> float:
    return slow_distance(target.reshape(len(target), -1), rebuilt.reshape(len(target), -1)).mean()


def unweighted_gradient(target: np.ndarray, rebuilt: np.ndarray) -> np.ndarray:
    """Of `unweighted_loss`: for an image, - (e / |d| - (e . d) d / |d|^3) / |e| over the number of images."""
    gradient = np.empty_like(rebuilt)
    for image, (e, d) in enumerate(zip(target, rebuilt, strict=True)):
        product, squares, length = (e * d).sum(), (d * d).sum(), math.sqrt((e * e).sum())
        gradient[image] = -(e / squares**0.5 - product * d / squares**1.5) / length / len(target)
    return gradient


def slow_gradient(target: np.ndarray, rebuilt: np.ndarray, share: float, factor: float = 0.1) -> np.ndarray:
    weights = mining_weights(slow_distance(target, rebuilt), share, factor)
    return weights[:, :, None] * unweighted_gradient(target, rebuilt)


def loss_and_gradient(target: np.ndarray, rebuilt: np.ndarray, *options: float) -> tuple[float, np.ndarray]:
    leaf = torch.tensor(rebuilt, requires_grad=True)
    loss = hard_mining_loss(torch.tensor(target), leaf, *options)
    loss.backward()
    return loss.item(), leaf.grad.numpy()


@pytest.mark.parametrize("factor", [0.1, 0.0, 0.5])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 30, 7), (16, 9, 2)])
def test_hard_mining_loss_value_and_gradient(shape, share, factor):
    target, rebuilt = double(normal(*shape)), double(normal(*shape, seed=3))
    loss, gradient = loss_and_gradient(target, rebuilt, share, factor)
    assert loss == pytest.approx(unweighted_loss(target, rebuilt), abs=1e-12)
    np.testing.assert_allclose(gradient, slow_gradient(target, rebuilt, share, factor), rtol=1e-9, atol=1e-14)


def test_easy_tokens_keep_a_tenth_of_their_gradient_by_default():
    target, rebuilt = double(normal(2, 8, 4)), double(normal(2, 8, 4, seed=3))
    np.testing.assert_array_equal(*(loss_and_gradient(target, rebuilt, 0.6, *factor)[1] for factor in ((), (0.1,))))


def found_weights(angles: np.ndarray, share: float) -> np.ndarray:
    """The factor on the gradient of every token, for tokens (B, N) that stand at these angles, in degrees, to their targets."""
    target = np.stack([np.ones(angles.shape), np.zeros(angles.shape)], axis=-1)
    rebuilt = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=-1)
    gradient, unweighted = loss_and_gradient(target, rebuilt, share)[1], unweighted_gradient(target, rebuilt)
    return (gradient * unweighted).sum(axis=-1) / (unweighted**2).sum(axis=-1)


@pytest.mark.parametrize(
    ("share", "smallest_hard_angle"),
    [(0, 5), (0.05, 10), (0.2, 20), (0.5, 50), (0.55, 60), (0.65, 70), (0.85, 90), (0.9, 90), (0.999999, 90), (1, 90)],
)  # of 10 tokens 10, 9, 8, 5, 4, 3, 1, 1, 1 and 1 are hard
def test_hard_tokens_by_hand_are_the_worst_of_the_whole_batch(share, smallest_hard_angle):
    angles = np.array([[10, 80, 30, 60, 50], [20, 90, 40, 70, 5]])
    expected = np.where(angles < smallest_hard_angle, 0.1, 1)
    np.testing.assert_allclose(found_weights(angles, share), expected, rtol=1e-9)


def test_tokens_as_far_as_the_last_hard_one_are_hard():
    angles = np.array([[60, 10, 60, 80, 60, 20]])
    np.testing.assert_allclose(found_weights(angles, 0.6), [[1, 0.1, 1, 1, 1, 0.1]], rtol=1e-9)  # 2 of 6 by count
    np.testing.assert_allclose(found_weights(np.full((2, 3), 45), 0.9), np.ones((2, 3)), rtol=1e-9)


def test_of_a_host_batch_1254_tokens_stay_hard():
    target, rebuilt = double(normal(16, 784, 3)), double(normal(16, 784, 3, seed=3))
    gradient = loss_and_gradient(target, rebuilt, 0.9)[1]
    ratios = gradient / unweighted_gradient(target, rebuilt)
    assert (ratios.mean(axis=-1) > 0.55).sum() == 1254


def test_the_target_of_hard_mining_gets_no_gradient():
    target, rebuilt = (normal(2, 3, 4, seed=seed).requires_grad_() for seed in (1, 2))
    hard_mining_loss(target, rebuilt, 0.5).backward()
    assert target.grad is None
    assert rebuilt.grad.abs().sum() > 0


def test_a_perfect_reconstruction_has_a_finite_gradient():
    target = normal(2, 3, 4)
    rebuilt = target.clone().requires_grad_()
    hard_mining_loss(target, rebuilt, 0.9).backward()
    assert rebuilt.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"groups": 1}, {"recentre": True}, {"remove_class_token": True}], ids=str)
def test_training_loss_mines_every_group_for_itself_and_patches_alone(monkeypatch, options):
    encoder = encoder_with_registers()
    detector, features = random_dinomaly(encoder, **options), random_features(encoder, images=3)
    groups = detector.options.groups
    rebuilt = (normal(3, groups, 16, 32, seed=5) + 2 * normal(3, groups, 1, 32, seed=6)).requires_grad_()
    detector.begin_iteration(800, 10_000)
    monkeypatch.setattr(detector, "reconstruct", lambda features: rebuilt)
    loss, parts = detector.training_loss(features)
    loss.backward()
    targets = np.stack([slow_target(double(image), 5, detector.options) for image in features])
    pairs = [(targets[:, group], double(rebuilt)[:, group]) for group in range(groups)]
    expected = np.mean([unweighted_loss(*pair) for pair in pairs])
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert {name: part.item() for name, part in parts.items()} == {"reconstruction": loss.item()}
    gradient = np.stack([slow_gradient(*pair, share=0.9 * 0.8) for pair in pairs], axis=1) / groups
    np.testing.assert_allclose(double(rebuilt.grad), gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_weights_get_the_gradient_of_the_form_with_stopped_gradients(tiny_encoder, attention):
    detector, features = random_dinomaly(tiny_encoder, decoder_attention=attention), random_features(tiny_encoder)
    detector.begin_iteration(1000, 10_000)
    detector.training_loss(features)[0].backward()
    gradients = {name: value.grad.clone() for name, value in detector.named_parameters() if value.requires_grad}
    detector.zero_grad()
    slow = 0
    for target, rebuilt in zip(features[:, :, 1:].unbind(1), detector.reconstruct(features).unbind(1), strict=True):
        weights = mining_weights(slow_distance(double(target), double(rebuilt)), 0.9, 0.1)
        weights = torch.tensor(weights, dtype=torch.float32).unsqueeze(-1)
        mixed = weights * rebuilt + (1 - weights) * rebuilt.detach()
        slow = slow + (1 - F.cosine_similarity(target.flatten(1), mixed.flatten(1), dim=-1)).mean() / 2
    slow.backward()
    for name, gradient in gradients.items():
        expected = detector.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item(), msg=name)


@pytest.mark.parametrize(
    ("iteration", "share"), [(0, 0), (1, 0.0009), (500, 0.45), (999, 0.8991), (1000, 0.9), (1001, 0.9), (9999, 0.9)]
)
@pytest.mark.parametrize("total", [5_000, 10_000, 50_000])
def test_the_mined_share_grows_for_a_thousand_iterations(iteration, share, total):
    assert DinomalyTraining().mined_share(iteration, total) == pytest.approx(share, rel=1e-12)


def test_the_mined_share_grows_for_at_most_a_fifth_of_a_short_run_unless_told_otherwise():
    shares = [DinomalyTraining().mined_share(iteration, 100) for iteration in (0, 10, 20, 99)]
    assert shares == pytest.approx([0, 0.45, 0.9, 0.9])
    options = DinomalyTraining(mining_warmup=40, mining_final=0.6)
    assert [options.mined_share(iteration, 100) for iteration in (0, 10, 40, 99)] == pytest.approx([0, 0.15, 0.6, 0.6])
    assert [DinomalyTraining().mined_share(0, total) for total in (4, 5)] == [0.9, 0]  # no room for a warm-up below 5
    assert DinomalyTraining(mining_warmup=0).mined_share(0, 100) == 0.9


def test_the_hard_tokens_of_every_iteration_are_as_many_as_the_hosts():
    points, training = 16 * 784, DinomalyTraining()
    for iteration in range(1100):
        expected = int(points * (1 - min(0.9 * iteration / 1000, 0.9)))
        assert int(points * (1 - training.mined_share(iteration, 10_000))) == expected


def test_training_tells_the_loss_its_share_and_the_optimiser_its_epsilon(tiny_encoder, monkeypatch, tmp_path):
    told, epsilons = [], []

    def mine(target, reconstruction, share, factor):
        told.append((share, factor))
        return hard_mining_loss(target, reconstruction, share, factor)

    def optimiser(groups, **options):
        epsilons.append(options["eps"])
        return StableAdamW(groups, **options)

    monkeypatch.setattr(models.dinomaly, "hard_mining_loss", mine)
    monkeypatch.setattr(utils.optim, "StableAdamW", optimiser)
    detector = build_dinomaly(tiny_encoder, DinomalyOptions())
    detector.train_with(DinomalyTraining(mining_final=0.8, mining_warmup=4, mining_factor=0.3))
    options = TrainingOptions(
        total_iterations=6,
        batch_size=2,
        warmup=2,
        peak_rate=2e-3,
        final_rate=2e-4,
        weight_decay=1e-4,
        adam_eps=3e-9,
        gradient_clip=0.1,
        seed=1,
        precision="fp32",
        num_workers=0,
        save_every=100,
        log_every=1,
    )
    fit(detector, Noise(), options, tmp_path, {}, MetricsLog(tmp_path / "log.jsonl", "noise"), resume=False)
    assert [share for share, _ in told] == pytest.approx(np.repeat([0, 0.2, 0.4, 0.6, 0.8, 0.8], 2))  # two groups each
    assert {factor for _, factor in told} == {0.3}
    assert epsilons == [3e-9]


def command(monkeypatch, *flags: str) -> tuple[Settings, Dinomaly]:
    """Settings of a command of Binary_Dinomaly.py, and the detector that it would train."""
    settings = []

    def run_experiment(made, host):
        assert host.name == "Dinomaly"
        settings.append((made, host))
        return 0

    monkeypatch.setattr(Binary_Dinomaly, "run_experiment", run_experiment)
    encoder = ["--encoder", "random_vit_tiny_14", "--input_size", "64", "--crop_size", "56"]
    assert Binary_Dinomaly.main([*encoder, "--data_path", "./datasets", *flags]) == 0
    (made, host), tiny = settings[0], build_encoder_without_weights("random_vit_tiny_14", 56, "", "0", 0)
    detector = host.build(tiny, made.config)
    host.prepare_training(detector, made.config)
    return made, detector


AUTHORS = {
    "MVTec-AD": (10_000, 0.2, 1e-10),
    "VisA": (10_000, 0.2, 1e-10),
    "Real-IAD": (50_000, 0.4, 1e-10),
    "MVTec-AD+Real-IAD": (50_000, 0.4, 1e-10),
    "MPDD": (10_000, 0.2, 1e-10),  # no script of theirs: as their other small ones
    "MVTec-AD single": (5_000, 0.2, 1e-8),
    "VisA single": (5_000, 0.2, 1e-8),
    "MPDD single": (5_000, 0.2, 1e-8),
    "Real-IAD single": (5_000, 0.2, 1e-10),
    "MVTec-AD few": (10_000, 0.2, 1e-10),  # no script of theirs: as with so many models
    "MVTec-AD few --per_category": (5_000, 0.2, 1e-8),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_numbers_of_the_authors_scripts(monkeypatch, name):
    dataset, *setting = name.split()
    flags = ["--setting", *setting] if setting else []
    settings, detector = command(monkeypatch, "--dataset", dataset, *flags, *(["--shot", "20"] if "few" in setting else []))
    options = settings.training_for("bottle", 209)
    assert (options.total_iterations, detector.training_options.bottleneck_dropout, options.adam_eps) == AUTHORS[name]
    assert detector.training_options == DinomalyTraining(bottleneck_dropout=AUTHORS[name][1])
    assert (options.warmup, options.peak_rate, options.final_rate) == (100, 2e-3, 2e-4)
    assert (options.batch_size, options.weight_decay, options.gradient_clip, options.seed) == (16, 1e-4, 0.1, 1)
    assert detector.options == DinomalyOptions("linear", groups=2, remove_class_token=False, recentre=False)
    assert settings.evaluation.mask_threshold == 0


def test_flags_win_over_the_authors_numbers(monkeypatch):
    flags = "--dataset Real-IAD --total_iters 77 --adam_eps 1e-7 --bottleneck_dropout 0.3 --learning_rate 0.01"
    flags += " --mining_final 0.5 --mining_warmup 10 --mining_factor 0"
    flags += " --decoder_attention softmax --groups 1 --remove_class_token --recentre"
    settings, detector = command(monkeypatch, *flags.split())
    options = settings.training_for("all", 209)
    assert (options.total_iterations, options.warmup, options.adam_eps, options.peak_rate) == (77, 15, 1e-7, 0.01)
    assert detector.training_options == DinomalyTraining(0.3, 0.5, 10, 0.0)
    assert detector.options == DinomalyOptions("softmax", 1, True, True)
    epochs, _ = command(monkeypatch, "--dataset", "Real-IAD", "--total_epochs", "3")
    assert epochs.training_for("all", 209).total_iterations == 3 * 13


@pytest.mark.parametrize(("dataset", "setting"), [("MVTec-AD", "multi"), ("MVTec-AD", "single"), ("Real-IAD", "multi")])
def test_learning_rates_of_a_command_are_the_hosts_arrays(monkeypatch, dataset, setting):
    settings, _ = command(monkeypatch, "--dataset", dataset, "--setting", setting)
    options = settings.training_for("bottle", 209)
    total = options.total_iterations
    numbers = (total, options.warmup, options.peak_rate, options.final_rate)
    rates = [learning_rate(iteration, *numbers) for iteration in range(total + 1)]
    steps = np.arange(total - 100)
    expected = [np.linspace(0, 2e-3, 100), 2e-4 + 0.5 * (2e-3 - 2e-4) * (1 + np.cos(np.pi * steps / (total - 100))), [2e-4]]
    np.testing.assert_allclose(rates, np.concatenate(expected), rtol=1e-12)
    assert (rates[0], rates[99], rates[100], rates[total]) == (0, 2e-3, 2e-3, 2e-4)
    assert max(rates) == 2e-3


@pytest.mark.parametrize("eps", [1e-10, 1e-8])
@pytest.mark.parametrize("size", [1e-9, 1e-7])
def test_stable_adamw_has_the_authors_epsilons_where_they_matter(size, eps):
    """The root of the second moment of such small gradients is about as large as the epsilon."""
    gradients = [[size * gradient for gradient in step] for step in gradients_of(6, "even")]
    rates = [0.0, 0.1, 0.2, 0.1, 0.05, 0.3]
    results, others = (torch_result(gradients, rates, eps=value) for value in (eps, 1.1 * eps))
    for index, (value, result) in enumerate(zip(starting_values(), results, strict=True)):
        expected, _ = slow_stable_adamw(value, [step[index] for step in gradients], rates, eps=eps)
        np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-12)
        assert abs(others[index] - result).max() > 1e-6  # the case does depend on it


def dropout_places(detector: Dinomaly, tokens: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What stands before and behind each place at which the bottleneck may drop something."""
    seen, layer = {}, detector.bottleneck[0]
    hooks = [
        linear.register_forward_hook(lambda linear, inputs, output: seen.update({linear: (inputs[0], output)}))
        for linear in (layer.fc1, layer.fc2)
    ]
    result = detector.through_bottleneck(tokens)
    for hook in hooks:
        hook.remove()
    (first_input, first_output), (second_input, second_output) = seen[layer.fc1], seen[layer.fc2]
    return {
        "input": (tokens, first_input),
        "hidden": (F.gelu(first_output), second_input),
        "output": (second_output, result),
    }


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_the_bottleneck_drops_at_its_input_hidden_and_output_with_one_rate(tiny_encoder, rate):
    detector = random_dinomaly(tiny_encoder).train()
    if rate != 0.2:  # the default
        detector.train_with(DinomalyTraining(bottleneck_dropout=rate))
    torch.manual_seed(0)
    dropped = {}
    for place, (before, after) in dropout_places(detector, normal(4, 100, 32)).items():
        dropped[place] = (after == 0) & (before != 0)
        torch.testing.assert_close(after[~dropped[place]], before[~dropped[place]] / (1 - rate))
        shares = dropped[place].double()
        assert shares.mean() == pytest.approx(rate, abs=0.015), place
        assert (shares.mean(dim=(0, 1)) - rate).abs().max() < 0.1, f"{place}: whole channels"
        assert shares.mean(dim=-1).max() < 1, f"{place}: whole tokens"
    both = (dropped["input"] & dropped["output"]).double().mean()
    assert both == pytest.approx(rate**2, abs=0.015)  # every place draws for itself


def test_nothing_is_dropped_at_rate_zero_nor_in_evaluation(tiny_encoder):
    detector = random_dinomaly(tiny_encoder)
    tokens = normal(2, 17, 32)
    for before, after in dropout_places(detector, tokens).values():
        assert torch.equal(before, after)
    detector.train().train_with(DinomalyTraining(bottleneck_dropout=0.0))
    for before, after in dropout_places(detector, tokens).values():
        assert torch.equal(before, after)


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_the_decoder_drops_nothing_in_training(tiny_encoder, attention):
    detector = random_dinomaly(tiny_encoder, decoder_attention=attention)
    tokens = normal(2, 17, 32)
    evaluated = detector.decode(tokens, ())
    detector.train().train_with(DinomalyTraining(bottleneck_dropout=0.4))
    assert torch.equal(detector.decode(tokens, ()), evaluated)


def test_cached_features_train_as_images_do():
    """The dropout comes after the encoder, so with the same seed the same values are dropped."""
    detector = random_dinomaly(encoder_with_registers()).train()
    images = normal(3, 3, 56, 56)
    detector.begin_iteration(700, 10_000)
    results = []
    for inputs in (images, detector.encode(images), images):
        torch.manual_seed(len(results) // 2)  # another seed for the third
        detector.zero_grad()
        loss = detector.training_loss(inputs)[0]
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in detector.trainable_parameters())])
    cached = [torch.equal(first, second) for first, second in zip(results[0], results[1], strict=True)]
    assert all(cached)
    assert results[2][0] != results[0][0]


def test_initial_weights_have_the_published_statistics(tiny_encoder):
    torch.manual_seed(0)
    state = build_dinomaly(tiny_encoder, DinomalyOptions()).trained_state()
    weights = {name: value.flatten() for name, value in state.items() if name.endswith("weight") and "norm" not in name}
    assert len(weights) == 2 + 8 * 4
    cut_at_three = stats.truncnorm(-3, 3, scale=0.01)
    pooled = double(torch.cat(list(weights.values())))
    assert abs(pooled).max() <= 0.03
    assert abs(pooled).max() > 0.0297
    assert pooled.std() == pytest.approx(cut_at_three.std(), rel=0.005)
    assert stats.kstest(pooled, cut_at_three.cdf).pvalue > 0.01
    for name, values in weights.items():
        assert values.std() == pytest.approx(cut_at_three.std(), rel=0.1), name
    others = {name: value for name, value in state.items() if name not in weights}
    assert len(others) == len(weights) + 8 * 2 * 2
    for name, values in others.items():
        assert (values == float(name.endswith("weight"))).all(), name


@pytest.mark.parametrize(
    ("size", "width", "total", "decoder", "bottleneck", "encoder"),
    [
        ("small", 384, 37.4, 14.20, 1.18, 22.06),
        ("base", 768, 148.0, 56.70, 4.72, 86.58),
        ("large", 1024, 413.5, 100.8, 8.4, 304.4),  # the paper's table has this row's parameters and MACs swapped
    ],
)
def test_parameter_counts_in_millions_are_the_published_ones(size, width, total, decoder, bottleneck, encoder):
    name, digits = f"dinov2reg_vit_{size}_14", 1 if size == "large" else 2
    with torch.device("meta"):
        frozen = build_encoder_without_weights(name, 392, "", "0", published_parameter_count(name))
        detector = build_dinomaly(frozen, DinomalyOptions())
    assert frozen.prefix_tokens == 5
    for block in detector.decoder:
        assert sum(value.numel() for value in block.parameters()) == 12 * width**2 + 13 * width
    counts = [sum(value.numel() for value in part.parameters()) for part in (detector.decoder, detector.bottleneck)]
    assert counts == [8 * (12 * width**2 + 13 * width), 8 * width**2 + 5 * width]
    assert sum(value.numel() for value in detector.trainable_parameters()) == sum(counts)
    counts.append(frozen.published_parameters)
    assert [round(count / 1e6, digits) for count in counts] == [decoder, bottleneck, encoder]
    assert round(sum(counts) / 1e6, 1) == total


def assert_all_finite(detector: Dinomaly, inputs: torch.Tensor, precision: str) -> None:
    """Loss, gradients and map, with everything on that training has."""
    detector.train().begin_iteration(1000, 10_000)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss, _ = detector.training_loss(inputs)
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    for name, parameter in detector.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        maps = detector.eval().anomaly_map(inputs)
    assert maps.isfinite().all()
    assert maps.dtype == torch.float32


INPUTS = {
    "all-zero image": torch.zeros(2, 3, 56, 56),
    "constant image": torch.tensor([1.5, -2.0, 0.3])[None, :, None, None].expand(2, 3, 56, 56),
    "all-zero features": torch.zeros(2, 2, 17, 32),
    "huge negative features": -1e4 * (1 + normal(2, 2, 17, 32).abs()),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"decoder_attention": "softmax"}, {"recentre": True}], ids=str)
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_dull_inputs_give_no_nan(tiny_encoder, inputs, options, precision):
    assert_all_finite(random_dinomaly(tiny_encoder, **options), inputs, precision)
    assert_all_finite(build_dinomaly(tiny_encoder, DinomalyOptions(**options)), inputs, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_queries_and_keys_that_underflow_give_no_nan(tiny_encoder, attention, precision):
    detector = random_dinomaly(tiny_encoder, decoder_attention=attention)
    with torch.no_grad():
        for block in detector.decoder:
            block.attn.qkv.bias[: 2 * 32] = -200
    assert_all_finite(detector, normal(2, 2, 17, 32), precision)
