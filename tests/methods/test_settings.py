"""Precision, layout, compilation, accumulation, and settings that cannot work."""

import functools
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Digits, denoiser, dmd_module, every_method, teacher_module, trainer
from tiny import module as new
from torch import nn

from lit_distill.callbacks import SampleGrid
from lit_distill.diffusion import (
    Denoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FewSteps,
    FlowDenoiser,
    GuidedDenoiser,
    VelocityDenoiser,
    karras_sigmas,
    sample,
    solve,
)
from lit_distill.methods import (
    DMD,
    DMD2,
    AdversarialDistillation,
    DiffusionTeacher,
    KnowledgeDistillation,
    SiD,
)


@every_method
def test_bf16_reaches_the_networks_but_neither_states_nor_levels(row, tmp_path):
    module, outside, inside = row.make(), set(), set()

    def note_states(_, args, output):
        assert {args[0].dtype, output.dtype} == {torch.float32}
        outside.add(args[1].dtype)

    for part in module.modules():
        if isinstance(part, Denoiser):
            part.register_forward_hook(note_states)
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda _, args, output: inside.add(output.dtype))
    trainer(tmp_path, max_steps=2, precision="bf16-mixed").fit(module, Digits())
    assert outside <= {torch.float32, torch.float64} and torch.bfloat16 in inside
    assert row.precise or inside == {torch.bfloat16}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())


@every_method
def test_channels_last_changes_the_layout_and_hardly_a_number(row, tmp_path):
    options = {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-2)}  # Adam magnifies rounding
    plain, module = row.make(**options), row.make(channels_last=True, **options)
    for trained in (plain, module):
        trainer(tmp_path, max_steps=2).fit(trained, Digits())
    layout = {"memory_format": torch.channels_last}
    weights = [p for p in module.parameters() if p.ndim == 4 and min(p.shape[1:3]) > 1]
    assert weights and all(p.is_contiguous(**layout) for p in weights)
    noise, label = torch.randn(4, 1, 8, 8), torch.arange(4)
    made = []
    for trained in (module, plain):
        source = torch.Generator().manual_seed(0)  # some students add noise between their steps
        made.append(trained.generate(noise, label, generator=source))
    torch.testing.assert_close(*made, rtol=1e-2, atol=1e-2)


class Perceptron(nn.Module):
    """Compiles in a second."""

    image_shape, num_classes, null_label = (1, 8, 8), 10, 10

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(11, 8)
        self.layers = nn.Sequential(nn.Linear(73, 16), nn.SiLU(), nn.Linear(16, 64))

    def forward(self, x, time, condition):
        seen = [x.flatten(1), time[:, None] / 1000, self.label(condition)]
        return self.layers(torch.cat(seen, 1)).view_as(x)


@pytest.mark.parametrize("kind", [DiffusionTeacher, DMD])
def test_compiled_networks_train_as_plain_ones_do(kind, tmp_path, monkeypatch):
    """By dynamo and autograd alone: their C++ compiler would take minutes."""
    backend = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", backend)
    options = {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-3)}
    if kind is DMD:
        options |= {"distance": "l2", "guidance": 2.0}
    losses, spent = [], []
    for compile_networks in (False, True):
        torch.manual_seed(0)
        start = EDMDenoiser(Perceptron())
        module = kind(start, compile=compile_networks, **options)
        run = trainer(tmp_path, max_steps=3)
        run.fit(module, Digits())
        assert all(
            (trained.module._compiled_call_impl is not None) == compile_networks
            for trained in module.trained_modules()
        )
        losses.append({k: float(v) for k, v in run.callback_metrics.items()})
        spent.append(module.teacher_evaluations)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0]
    assert spent[0] == spent[1] == (3 * 16 * 2 if kind is DMD else 0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DMD2, {}), (DMD2, {"features": "teacher"}), (AdversarialDistillation, {})],
)
def test_features_are_seen_beside_compiled_networks(kind, options, tmp_path, monkeypatch):
    """Those of a network that has been asked without a look at them before."""
    backend = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", backend)
    losses = []
    for compile_networks in (False, True):
        torch.manual_seed(0)
        made = kind(
            EDMDenoiser(Perceptron()),
            compile=compile_networks,
            feature_layers=["layers.0"],
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-3),
            **options,
        )
        grid = SampleGrid(num_images=2, columns=2, every_n_steps=1)
        run = trainer(tmp_path, grid, max_steps=3)
        run.fit(made, Digits())
        assert (made.student._compiled_call_impl is not None) == compile_networks
        losses.append({k: float(v) for k, v in run.callback_metrics.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0]


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, monkeypatch):
    """Where each sample's noise follows from the sample alone, two halves make the same step."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.sin(5 * x + 1))
    monkeypatch.setattr(
        DMD, "draw_sigma", lambda self, x: torch.full((len(x.image),), 0.5).double()
    )
    gradients = []
    for accumulate in (1, 2, 4):
        module, seen = dmd_module(accumulate=accumulate, clip=None, update_ratio=2), []
        gradients.append(seen)
        networks = [module.student, module.fake_score]
        monkeypatch.setattr(
            module,
            "on_before_optimizer_step",
            lambda _, networks=networks, seen=seen: seen.append(
                [p.grad.clone() for n in networks for p in n.parameters() if p.grad is not None]
            ),
        )
        trainer(tmp_path, max_steps=1).fit(module, Digits())
    assert len(gradients[0]) == 3  # the student's step and two of the fake score
    for whole, *parts in zip(*gradients, strict=True):
        for part in parts:
            torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_gradients_are_clipped_for_each_network(clip, tmp_path, monkeypatch):
    module, norms = dmd_module(clip=clip, fake_clip=10 * clip if clip else None), []

    def note(optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(nn.utils.get_total_norm([p.grad for p in parameters]).item())

    monkeypatch.setattr(module, "on_before_optimizer_step", note)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, Digits())
    logged = [run.callback_metrics[f"grad_norm/{n}"].item() for n in ("student", "fake_score")]
    expected = logged if clip is None else [1e-3, 1e-2]
    assert min(logged) > 1e-2 and norms == pytest.approx(expected, rel=1e-3)


def test_a_tiny_run_logs_what_dmd_promises(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    module = dmd_module()
    run.fit(module, Digits())
    assert set(run.callback_metrics) >= {
        "loss/distribution",
        "loss/regression",
        "loss/fake_score",
        "weight/mean",
        "grad_norm/student",
        "grad_norm/fake_score",
    }
    rows = module.preview(torch.randn(2, 1, 8, 8), torch.arange(2))
    assert list(rows) == ["student", "noised", "real", "fake"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"update_ratio": 0}, "update_ratio=0: the fake score needs at least 1"),
        ({"noise_range": (0.5, 0.5)}, r"noise_range=\(0.5, 0.5\) must be two rising shares"),
        ({"noise_range": (0.1, 1.2)}, r"noise_range=\(0.1, 1.2\) must be two rising shares"),
        ({"generator_sigma": 90.0}, r"generator_sigma=90.0 is outside .* \(0.002 to 80\)"),
        ({"distance": "l7"}, "distance='l7' is unknown; choose one of lpips, l2"),
        ({"accumulate": 0}, "accumulate=0: a batch has at least 1 part"),
    ],
)
def test_settings_of_dmd_that_cannot_work(options, words):
    with pytest.raises(ValueError, match=words):
        dmd_module(**options)


def fails(tmp_path, module, data, words, **options):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, max_steps=1, **options).fit(module, data)


def test_regression_needs_pairs(tmp_path):
    class Plain(Digits):
        def on_before_batch_transfer(self, batch, _):
            return batch

    words = "needs noise-image pairs.*PairsDataModule.*regression_weight to 0"
    fails(tmp_path, dmd_module(), Plain(), words)
    trainer(tmp_path, max_steps=1).fit(dmd_module(regression_weight=0.0), Plain())


def test_label_dropout_needs_a_null_class():
    with pytest.raises(ValueError, match=r"label_dropout=0.1 needs .*num_classes"):
        DiffusionTeacher(denoiser(num_classes=None), label_dropout=0.1)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_teachers_samples_may_end_their_grid_elsewhere(guidance, tmp_path):
    made, seen = teacher_module(steps=4, sigma_min=0.05, guidance=guidance), []
    made.network.register_forward_hook(lambda _, args, x: seen.append(float(args[1][0])))
    noise, label = torch.randn(2, 1, 8, 8), torch.arange(2)
    x = made.generate(noise, label)
    levels = karras_sigmas(4, 0.05, 80.0)
    assert sorted(set(seen), reverse=True) == pytest.approx(levels[:-1].tolist())
    model = GuidedDenoiser(made.network, guidance)
    torch.testing.assert_close(x, solve(model, model.start(noise), levels, condition=label))
    made.trainer = trainer(tmp_path)
    assert made.sampling_record()["sigma_min"] == 0.05
    with pytest.raises(ValueError, match=r"sigma_min=90.0 is outside .* 0.002 to 80"):
        teacher_module(sigma_min=90.0)


def test_guidance_needs_a_null_class(tmp_path):
    module = DMD(denoiser(num_classes=None), distance="l2", guidance=2.0)
    fails(tmp_path, module, Digits(), "no null class.*guidance 1")


class Unlabelled(Digits):
    num_classes = None

    def load(self, split):
        return super().load(split)[0], None


class Wide(Digits):
    image_shape = (1, 8, 10)

    def load(self, split):
        images, labels = super().load(split)
        return nn.functional.pad(images, (1, 1)), labels


@every_method
def test_networks_that_do_not_fit_the_data(row, tmp_path):
    words = r"knows 10 classes, but the data set 'digits' has no labels.*option teacher"
    fails(tmp_path, row.make(), Unlabelled(), words)
    words = r"shape \(1, 8, 8\), but .* \(1, 8, 10\)"
    fails(tmp_path, row.make(), Wide(), words)


def test_an_unconditional_network_takes_no_notice_of_labels(tmp_path):
    for module in (
        DiffusionTeacher(denoiser(num_classes=None)),
        DMD(denoiser(num_classes=None), distance="l2"),
    ):
        trainer(tmp_path, max_steps=1).fit(module, Digits())


def test_a_batch_that_does_not_divide(tmp_path):
    words = "batch of 16 does not divide .*accumulate=3"
    fails(tmp_path, dmd_module(accumulate=3), Digits(), words)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_float16_is_refused(tmp_path, precision, monkeypatch):
    module = dmd_module()
    run = trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(type(run), "precision", precision)  # a CPU offers no float16 scaler
    with pytest.raises(ValueError, match=f"precision={precision} does not work .*bf16-mixed"):
        run.fit(module, Digits())


def test_labels_are_dropped_at_the_asked_rate(tmp_path):
    module, seen = teacher_module(label_dropout=0.25), []
    module.student.register_forward_pre_hook(lambda _, args: seen.append(args[2].clone()))
    trainer(tmp_path, max_steps=30).fit(module, Digits())
    labels = torch.cat(seen)
    share = (labels == module.student.null_label).float().mean()
    assert len(labels) == 480 and 0.17 < share < 0.33  # four standard deviations
    assert set(labels.tolist()) == set(range(11))


@pytest.mark.parametrize("kind", [EpsilonDenoiser, VelocityDenoiser, FlowDenoiser])
def test_any_kind_of_denoiser_is_trained_and_distilled(kind, tmp_path):
    noise, label = torch.randn(4, 1, 8, 8), torch.arange(4)
    start = kind(denoiser().network).requires_grad_(False)
    expected = sample(start, noise, steps=1, solver="euler", condition=label)
    for module in (
        DiffusionTeacher(kind(denoiser().network), solver="euler"),
        DMD(kind(denoiser().network), "l2", guidance=1.5),
    ):
        assert torch.equal(module.generate(noise, label, 1), expected)
        run = trainer(tmp_path, max_steps=2)
        run.fit(module, Digits())
        assert all(value.isfinite() for value in run.callback_metrics.values())
        assert not torch.equal(module.generate(noise, label, 1), expected)


def test_a_lowered_start_holds_for_the_student_alone(tmp_path):
    module = dmd_module(generator_sigma=5.0)
    assert module.student.sigma_max == module.network.sigma_max == 5.0
    assert module.teacher.sigma_max == module.fake_score.sigma_max == 80.0
    assert module.network.few_steps == FewSteps((1,))


def test_a_start_that_a_distilled_student_does_not_know_is_warned_of():
    distilled = denoiser(seed=1)
    distilled.few_steps = FewSteps((1,))
    for kind in (SiD, AdversarialDistillation, KnowledgeDistillation):
        with pytest.warns(UserWarning, match=r"make its samples from sigma=80.*generator_sigma"):
            other = new(kind, student=distilled, generator_sigma=5.0)
        assert other.student.sigma_max == 5.0
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="generator_sigma")
            same = new(kind, student=distilled, generator_sigma=None)
            new(kind, student=distilled, generator_sigma=80.0)
            new(kind, student=denoiser(seed=1), generator_sigma=5.0)  # a teacher
        assert same.student.sigma_max == 80.0


def test_a_student_of_another_size(tmp_path):
    small = denoiser(seed=1, block_out_channels=[4, 8])
    module = dmd_module(student=small, fake_score=denoiser(seed=2))
    count = [sum(p.numel() for p in part.parameters()) for part in (module.student, small)]
    assert count[0] == count[1] < sum(p.numel() for p in module.teacher.parameters())
    before = small.fingerprint()
    saver = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True)
    trainer(tmp_path, saver, max_steps=1, enable_checkpointing=True).fit(module, Digits())
    assert small.fingerprint() == before != module.student.fingerprint()
    assert module.fake_score.fingerprint() != denoiser(seed=2).fingerprint()
