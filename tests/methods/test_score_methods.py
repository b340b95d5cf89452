"""What is special to DMD2, SiD, adversarial distillation and adapters."""

import copy
import sys

import pytest
import torch
from tiny import (
    JUDGED,
    Digits,
    adam,
    denoiser,
    dmd_module,
    flow,
    module,
    trainer,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_distill.callbacks import ExportPipeline, RunDoctor
from lit_distill.datamodules import DigitsDataModule
from lit_distill.diffusion import (
    EpsilonDenoiser,
    EvaluationCounter,
    FlowDenoiser,
    GaussianMixtureDenoiser,
    sample,
)
from lit_distill.losses import score_identity_loss
from lit_distill.methods import (
    DMD,
    DMD2,
    AdversarialDistillation,
    FlowDistillation,
    MeanFlow,
    MultiBoundaryConsistencyDistillation,
    ProgressiveDistillation,
    RectifiedFlow,
    Reflow,
    SiD,
    dmd2,
)
from lit_distill.methods.dmd import Generated
from lit_distill.methods.dmd2 import samples_of_steps, steps_in_turn
from lit_distill.models import LoRA, MNISTUNet, UNet, load_denoiser

PLAIN = {"adversarial_weight": 0.0, "discriminator_weight": 0.0}


def weights(part):
    return copy.deepcopy(part.state_dict())


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# --- DMD2 ---------------------------------------------------------------------------------------


def test_without_a_gan_and_at_ratio_1_dmd2_is_dmd_without_regression_to_the_bit(tmp_path):
    ours = DMD2(denoiser(), update_ratio=1, optimizer=adam, **PLAIN)
    theirs = DMD(denoiser(), regression_weight=0, optimizer=adam)
    for made in (ours, theirs):
        trainer(tmp_path, max_steps=3).fit(made, Digits())
    assert ours.discriminator is None
    for name in ("student", "fake_score", "ema"):
        assert equal(weights(getattr(ours, name)), weights(getattr(theirs, name))), name


def test_dmd2_with_a_regression_is_dmd(tmp_path):
    ours = DMD2(
        denoiser(), update_ratio=1, regression_weight=0.25, distance="l2", optimizer=adam, **PLAIN
    )
    theirs = dmd_module()
    for made in (ours, theirs):
        trainer(tmp_path, max_steps=2).fit(made, Digits())
    assert equal(weights(ours.student), weights(theirs.student))


def test_the_gan_moves_the_student_as_distribution_matching_does_not(tmp_path):
    students = []
    for weight in (0.0, 1.0):
        made = module(DMD2, **{**JUDGED, "adversarial_weight": weight, "update_ratio": 1})
        trainer(tmp_path, max_steps=2).fit(made, Digits())
        students.append(weights(made.student))
    assert not equal(*students)


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_the_discriminator_learns_to_tell_digits_from_noise(features, tmp_path):
    torch.manual_seed(0)
    made = module(
        DMD2,
        **{**JUDGED, "adversarial_weight": 0.0},
        features=features,
        update_ratio=4,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        fake_optimizer=lambda p: torch.optim.Adam(p, lr=3e-3),
    )
    run = trainer(tmp_path, max_steps=40)
    run.fit(made, Digits(batch_size=64))
    assert run.callback_metrics["discriminator/win_rate"] > 0.65  # a coin: 0.50 +- 0.04


def test_fake_only_steps_run_the_generator_without_a_graph(tmp_path):
    made, graphs = module(DMD2, update_ratio=4, **JUDGED), []
    made.student.register_forward_hook(lambda _, args, x: graphs.append(x.requires_grad))
    trainer(tmp_path, max_steps=2).fit(made, Digits())
    assert graphs == [True, False, False, False] * 2


def test_a_step_of_several_is_trained_on_the_students_own_samples():
    """The state before the last evaluation is what sampling would have there."""
    made = module(DMD2, steps=3, **JUDGED)
    student, seen = made.student, []
    student.register_forward_hook(lambda _, args, x: seen.append((args[0], args[1], x)))
    noise, label = torch.randn(4, 1, 8, 8), torch.arange(4)
    for stop in range(3):
        seen.clear()
        torch.manual_seed(1)
        x = samples_of_steps(student, noise, torch.full((4,), stop), 3, label)
        assert len(seen) == stop + 1 and x.requires_grad
        assert [out.requires_grad for _, _, out in seen] == [False] * stop + [True]
        levels = student.grid(3).tolist()
        assert [float(s[0]) for _, s, _ in seen] == pytest.approx(levels[: stop + 1])
    torch.manual_seed(1)
    with torch.no_grad():
        whole = sample(student, noise, steps=3, condition=label)
    torch.testing.assert_close(x.detach(), whole)
    # Or on data, which a single evaluation denoises.
    seen.clear()
    data = torch.randn(4, 1, 8, 8)
    samples_of_steps(student, noise, torch.tensor([2, 1, 0, 2]), 3, label, data)
    ((state, sigma, _),) = seen
    level = torch.tensor([levels[2], levels[1], levels[0], levels[2]])
    torch.testing.assert_close(sigma, level)
    start = data * torch.tensor([1.0, 1, 0, 1])[:, None, None, None]
    torch.testing.assert_close(state, start + level[:, None, None, None] * noise)


def test_samples_of_different_steps_go_their_own_ways(monkeypatch):
    """Each as far as its step, under its own label, with nothing evaluated in vain."""
    made = module(DMD2, steps=3, **JUDGED)
    student, seen = made.student, []
    student.register_forward_hook(lambda _, args, x: seen.append((*args, x)))
    monkeypatch.setattr(torch, "randn_like", lambda x: 0 * x)  # what is noised again, unnoised
    noise, label = torch.randn(4, 1, 8, 8), torch.tensor([3, 1, 4, 5])
    x = samples_of_steps(student, noise, torch.tensor([0, 2, 1, 2]), 3, label)
    first, second, last = seen
    assert [condition.tolist() for _, _, condition, _ in seen] == [[1, 4, 5], [1, 5], [3, 1, 4, 5]]
    levels = student.grid(3).tolist()
    assert last[1].tolist() == pytest.approx([levels[i] for i in (0, 2, 1, 2)])
    start = student.start(noise)
    torch.testing.assert_close(first[0], start[1:])
    torch.testing.assert_close(second[0], first[3][[0, 2]])
    torch.testing.assert_close(last[0][[0, 2]], torch.stack([start[0], first[3][1]]))
    torch.testing.assert_close(last[0][[1, 3]], second[3])
    torch.testing.assert_close(x, last[3])


def test_steps_take_their_turns():
    torch.manual_seed(0)
    assert all(steps_in_turn(8, 4).bincount().tolist() == [2] * 4 for _ in range(5))
    assert {int(steps_in_turn(1, 3)) for _ in range(50)} == {0, 1, 2}  # in small batches, too


@pytest.mark.parametrize("kind", [DMD2, SiD, AdversarialDistillation])
def test_what_is_noised_again_is_judged_from_that_level_on(kind, tmp_path, monkeypatch):
    """Student and fake score, so that one step's errors cannot make up for another's."""
    made, seen = module(kind, steps=3), []
    drawn = made.draw_sigma
    monkeypatch.setattr(
        made, "draw_sigma", lambda x: seen.append((x.sigma_min, drawn(x))) or seen[-1][1]
    )
    trainer(tmp_path, max_steps=12).fit(made, Digits())
    low, sigma = (torch.cat(column) for column in zip(*seen, strict=True))
    assert sorted(low.unique().tolist(), reverse=True) == pytest.approx(
        made.student.grid(3)[1:].tolist()
    )
    assert bool((sigma >= low).all())
    assert float(sigma[low == 0].min()) < float(low[low > 0].min())  # the last step's at all levels


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DMD2, {}), (SiD, {}), (AdversarialDistillation, {}), (DMD2, {"fake_score_knows_step": True})],
)
def test_each_sample_is_judged_as_of_its_own_step(kind, options, monkeypatch):
    made, drawn = module(kind, steps=3, **options), []

    def watched(student, noise, step, *rest):
        drawn.append(step)
        return samples_of_steps(student, noise, step, *rest)

    monkeypatch.setattr(sys.modules[kind.generated.__module__], "samples_of_steps", watched)
    batch = {"image": torch.randn(7, 1, 8, 8), "label": torch.arange(7)}
    for _ in range(5):
        samples = made.generated(batch)
        if options:
            assert torch.equal(samples.condition["step"], drawn[-1])
            assert torch.equal(samples.condition["label"], batch["label"])
        else:
            assert torch.equal(samples.sigma_min, made.student.grid(3)[drawn[-1] + 1].float())


@pytest.mark.parametrize("kind", [DMD2, SiD])
def test_a_fake_score_that_knows_the_step_judges_all_steps_at_all_levels(
    kind, tmp_path, monkeypatch
):
    made, seen = module(kind, steps=3, fake_score_knows_step=True, **JUDGED), []
    drawn = made.draw_sigma
    monkeypatch.setattr(made, "draw_sigma", lambda x: seen.append((x, drawn(x))) or seen[-1][1])
    start, asked = weights(made.fake_score), []
    made.fake_score.register_forward_hook(lambda _, args, x: asked.append(args[2]))
    doctor = RunDoctor(every_n_steps=4, num_samples=4)
    trainer(tmp_path, ExportPipeline(), doctor, max_steps=12).fit(made, Digits())
    assert len({len(condition["step"]) for condition in asked}) > 1  # the doctor tells it, too
    step = torch.cat([x.condition["step"] for x, _ in seen])
    sigma = torch.cat([sigma for _, sigma in seen])
    assert set(step.tolist()) == {0, 1, 2}
    for i in range(3):
        assert float(sigma[step == i].min()) < float(made.student.grid(3)[2])
    # It has learned of the step, which neither the teacher nor the student is asked with.
    assert not equal(start, weights(made.fake_score))
    x, level, label = torch.randn(4, 1, 8, 8), torch.ones(4), torch.arange(4)
    told = [made.with_step(label, torch.full((4,), i)) for i in range(2)]
    assert not torch.equal(*(made.fake_score(x, level, condition) for condition in told))
    assert torch.equal(*(made.teacher(x, level, condition) for condition in told))
    asked.clear()
    made.preview(x, label)
    assert [condition["step"].tolist() for condition in asked] == [[2] * 4]
    assert "step" not in load_denoiser(tmp_path / "pipeline").inputs


@pytest.mark.parametrize("kind", [DMD2, SiD, AdversarialDistillation])
def test_levels_of_the_steps_can_be_chosen(kind, tmp_path):
    made = module(kind, steps=3, levels=[1.5, 0.5])
    trainer(tmp_path, ExportPipeline(), max_steps=1).fit(made, Digits())
    exported, seen = load_denoiser(tmp_path / "pipeline"), []
    grid = [made.student.sigma_max, 1.5, 0.5, 0.0]
    assert exported.grid(3).tolist() == made.student.grid(3).tolist() == grid
    exported.register_forward_hook(lambda _, args, x: seen.append(float(args[1][0])))
    sample(exported, torch.randn(2, 1, 8, 8), steps=3, condition=torch.arange(2))
    assert seen == grid[:3]


def test_all_updates_of_a_batch_draw_steps_of_their_own(tmp_path, monkeypatch):
    made, drawn = module(DMD2, steps=4, update_ratio=4, **JUDGED), []
    monkeypatch.setattr(
        dmd2, "steps_in_turn", lambda *args: drawn.append(steps_in_turn(*args)) or drawn[-1]
    )
    trainer(tmp_path, max_steps=8).fit(made, Digits())
    assert len(drawn) == 8 * 4
    batches = [drawn[i : i + 4] for i in range(0, 32, 4)]
    assert any(not torch.equal(batch[0], other) for batch in batches for other in batch[1:])


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_other_divergences_weigh_the_samples(divergence):
    """A sample that the discriminator takes for real counts more."""
    torch.manual_seed(0)
    made = module(DMD2, divergence=divergence, fake_score=denoiser(seed=1), **JUDGED)
    made.log = lambda *args, **options: None
    given = torch.tensor([[-2.0], [2.0]])
    made.logits = lambda *args: given
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    samples = Generated(x, torch.arange(2), x)
    torch.manual_seed(1)
    (weighed,) = torch.autograd.grad(made.distribution_loss(samples), x)
    given = torch.zeros(2, 1)
    torch.manual_seed(1)
    (even,) = torch.autograd.grad(made.distribution_loss(samples), x)
    ratios = [float((weighed[i] / even[i]).mean()) for i in range(2)]
    assert ratios[0] < 1 < ratios[1] and sum(ratios) == pytest.approx(2, rel=1e-4)


# --- SiD ----------------------------------------------------------------------------------------


def test_sids_gradient_is_half_that_of_the_fisher_divergence():
    """alpha = 0.5, not normalised, Gaussians: in the mean and the width of the generator."""
    torch.manual_seed(0)
    target, width, sigma = torch.tensor(0.7), torch.tensor(0.8), 0.6
    mean = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    std = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def exact(mean, std, x):
        gain = std**2 / (std**2 + sigma**2)
        return mean + gain * (x - mean)

    half = torch.randn(400_000, 2, dtype=torch.float64)
    z = torch.cat([half, -half])  # antithetic, whose mean is exact
    z = (z - z.mean(0)) / (z.square().mean(0)).sqrt()
    x = mean + std * z[:, :1]
    noisy = x + sigma * z[:, 1:]
    real = exact(target.double(), width.double(), noisy)
    fake = exact(mean.detach(), std.detach(), noisy)
    loss = score_identity_loss(x, real, fake, 0.5, normalise=False).mean()
    ours = torch.autograd.grad(loss, [mean, std])
    # E |f_real - f_fake|^2 over the generator's noised density, with its score moving along
    gain, other = width**2 / (width**2 + sigma**2), std**2 / (std**2 + sigma**2)
    shift = (1 - gain) * target - (1 - other) * mean + (gain - other) * mean
    fisher = shift**2 + (gain - other) ** 2 * (std**2 + sigma**2)
    theirs = torch.autograd.grad(fisher, [mean, std])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b / 2, rtol=5e-3, atol=1e-4)


def test_sid_asks_both_scores_with_a_graph_and_trains_neither(tmp_path):
    made, graphs = module(SiD), []
    made.teacher.register_forward_hook(lambda _, args, x: graphs.append(x.requires_grad))
    trainer(tmp_path, max_steps=2).fit(made, Digits())
    assert graphs == [True, True]
    assert made.student.sigma_max == 2.5
    assert all(p.requires_grad for p in made.fake_score.parameters())


def test_sid_with_a_gan(tmp_path):
    made = module(SiD, **JUDGED)
    before = weights(made.discriminator)
    trainer(tmp_path, max_steps=1).fit(made, Digits())
    assert not equal(before, weights(made.discriminator))


# --- Adversarial --------------------------------------------------------------------------------


class Eye(nn.Module):
    """A network that looks at images."""

    image_shape = (1, 8, 8)

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3)

    def forward(self, images):
        return self.layer(images)


def test_an_injected_network_looks_at_clean_images_and_stays_as_it_is(tmp_path):
    eye, seen = Eye(), []
    made = module(AdversarialDistillation, feature_network=eye)
    eye.register_forward_hook(lambda _, args, x: seen.append(args[0].detach()))
    before = weights(eye)
    run = trainer(tmp_path, max_steps=2)
    run.fit(made, Digits())
    assert equal(before, weights(made.feature_network))
    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("feature_network") for name in state)
    real = seen[2]  # the student's samples twice, then the data
    assert real.min() >= -1 and real.max() <= 1 and real.unique().numel() < 20  # 17 grey levels


def test_the_teachers_denoising_draws_the_student(tmp_path):
    students = []
    for weight in (0.0, 10.0):
        made = module(AdversarialDistillation, distillation_weight=weight)
        trainer(tmp_path, max_steps=2).fit(made, Digits())
        students.append(weights(made.student))
    assert not equal(*students)


# --- Memory -------------------------------------------------------------------------------------


def test_adapters_are_all_that_is_trained_and_saved(tmp_path):
    made = module(DMD, lora=LoRA(rank=2))
    run = trainer(tmp_path, max_steps=2)
    run.fit(made, Digits())
    for name, parameter in made.student.named_parameters():
        assert parameter.grad is not None, name
    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(".adapter." in name for name in state if not name.startswith("ema.n_"))


def test_a_teacher_in_bfloat16_is_known_by_its_first_name(tmp_path):
    teacher = denoiser()
    name = teacher.fingerprint()
    made = DMD(teacher, "l2", teacher_precision="bfloat16", optimizer=adam)
    assert {p.dtype for p in made.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in made.student.parameters()} == {torch.float32}
    assert made.teacher.original == name and made.student.original is None
    trainer(tmp_path, max_steps=2).fit(made, Digits())


def test_states_that_are_computed_again_change_no_number(tmp_path):
    students, calls = [], []
    for checkpointing in (False, True):
        made = dmd_module(gradient_checkpointing=checkpointing)
        resnet = made.student.network.unet.down_blocks[0].resnets[0]
        count = []
        resnet.register_forward_pre_hook(lambda *args, count=count: count.append(1))
        trainer(tmp_path, max_steps=2).fit(made, Digits())
        students.append(weights(made.student))
        calls.append(len(count))
    assert equal(*students)
    assert calls[1] == 2 * calls[0]


def test_an_average_elsewhere_is_the_same_average(tmp_path):
    averages = []
    for device in (None, "cpu"):
        made = dmd_module(ema_device=device)
        trainer(tmp_path, max_steps=3).fit(made, Digits())
        averages.append(weights(made.ema))
    assert equal(*averages)
    made.to(torch.float64)  # as a move to a GPU would
    assert {p.dtype for p in made.ema.parameters()} == {torch.float32}
    assert {p.dtype for p in made.student.parameters()} == {torch.float64}


# --- Settings that cannot work ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (DMD2, {"steps": 0}, "steps=0.*at least 1 step"),
        (DMD2, {"steps": 3, "levels": [2.0]}, r"levels=\[2.0\].* of 3 step\(s\).* 2 levels"),
        (DMD2, {"steps": 3, "levels": [1.0, 2.0]}, "which fall, between its smallest and largest"),
        (DMD2, {"levels": [1.0]}, r"of 1 step\(s\)"),
        (AdversarialDistillation, {"steps": 2, "levels": [100.0]}, r"\(0.002 and 80\)"),
        (DMD2, {"inputs": "x"}, "inputs='x'.*backward_simulation or noised_data"),
        (DMD2, {"fake_score_knows_step": True}, "steps=1: there is only one"),
        (
            DMD2,
            {"fake_score_knows_step": True, "steps": 2, "lora": LoRA(2)},
            "with lora: .*Use one of the two",
        ),
        (
            DMD2,
            {"fake_score_knows_step": True, "steps": 2, "features": "teacher"},
            "would not know the step",
        ),
        (DMD2, {"features": "x"}, "features='x'.*fake_score or teacher"),
        (DMD2, {"divergence": "x"}, "divergence='x'.*jensen_shannon"),
        (DMD2, {"divergence": "forward_kl", **PLAIN}, "needs a discriminator"),
        (
            DMD2,
            {"divergence": "forward_kl", **JUDGED, "adversarial_loss": "hinge"},
            "log ratio.*'hinge'.*use softplus",
        ),
        (DMD2, {"discriminator_weight": 0.0}, "nothing would train the discriminator"),
        (DMD2, {"adversarial_loss": "x"}, "adversarial_loss='x'.*softplus or hinge"),
        (DMD2, {"feature_layers": ["unet.x"]}, r"no layer unet\.x.*it has .*unet\.mid_block"),
        (DMD2, {"update_ratio": 0}, "update_ratio=0.*at least 1 update"),
        (DMD2, {"steps": 2, "regression_weight": 1.0}, "steps=2.*that of one step"),
        (SiD, {"divergence": "forward_kl", **JUDGED}, "SiD has its own"),
        (SiD, {"generator_sigma": 100.0}, "generator_sigma=100.0 is outside"),
        (AdversarialDistillation, {"steps": 0}, "steps=0"),
        (AdversarialDistillation, {"adversarial_loss": "x"}, "softplus or hinge"),
        (AdversarialDistillation, {"feature_layers": ["x"]}, "no layer x"),
        (
            AdversarialDistillation,
            {"feature_layers": ["x"], "feature_network": Eye()},
            "not of feature_network",
        ),
        (DMD, {"lora": LoRA(target_modules=["x"])}, r"target_modules=\['x'\] match no layer"),
        (DMD, {"lora": LoRA(), "student": denoiser()}, "leave the options student"),
        (DMD, {"lora": LoRA(), "gradient_checkpointing": True}, "Use one of the two"),
        (DMD, {"teacher_precision": "float16"}, "choose float32 or bfloat16"),
        (MeanFlow, {"derivative": "x"}, "jvp or finite_difference"),
        (MeanFlow, {"equal_share": 1.0}, "equal_share=1.0"),
        (MeanFlow, {"shift": 0.0}, "shift=0.0 must be above 0"),
        (MeanFlow, {"steps": []}, "steps is an empty list"),
    ],
)
def test_settings_that_cannot_work(kind, options, words):
    with pytest.raises(ValueError, match=words):
        module(kind, **options)


def test_flows_that_are_none():
    with pytest.raises(ValueError, match=r"denoiser is a EDMDenoiser.*needs a FlowDenoiser"):
        RectifiedFlow(denoiser())
    with pytest.raises(ValueError, match="student is a EDMDenoiser"):
        Reflow(denoiser(), student=denoiser())
    with pytest.raises(ValueError, match="starts from a EDMDenoiser, which is no flow"):
        FlowDistillation(denoiser(), "l2")
    with pytest.raises(ValueError, match="needs a teacher, or a student"):
        MeanFlow()
    with pytest.raises(ValueError, match=r"guidance=2.*needs a teacher"):
        MeanFlow(student=flow(), guidance=2.0)
    exact = GaussianMixtureDenoiser(torch.zeros(1, 1, 8, 8), 1.0)
    with pytest.raises(ValueError, match="no network that a student could start as"):
        Reflow(exact)


def test_reflow_of_a_diffusion_model_makes_a_flow_with_its_network():
    teacher = denoiser()
    made = Reflow(teacher, optimizer=adam)
    assert isinstance(made.student, FlowDenoiser) and made.student.few_steps is None
    ours, theirs = made.student.network.state_dict(), teacher.network.state_dict()
    assert equal(ours, theirs)


@pytest.mark.parametrize("kind", [Reflow, FlowDistillation])
def test_reflow_without_noise(kind, tmp_path):
    with pytest.raises(ValueError, match="needs noise-image pairs, but the batches hold images"):
        trainer(tmp_path, max_steps=1).fit(module(kind), DigitsDataModule(batch_size=8))


def test_networks_that_cannot_be_computed_again():
    made = denoiser()
    made.network = Eye()
    with pytest.raises(ValueError, match="Eye cannot compute its states again"):
        DMD(made, "l2", gradient_checkpointing=True)


def test_a_fake_score_without_a_place_for_the_step():
    teacher = EpsilonDenoiser(UNet.wrap(MNISTUNet(8, 1, 8, 4)))
    with pytest.raises(ValueError, match="fake_score_knows_step=True: An MNISTUNet has no place"):
        DMD2(teacher, steps=2, fake_score_knows_step=True)
    other = denoiser()
    other.network = Eye()
    with pytest.raises(ValueError, match="fake_score_knows_step=True: Eye has no place"):
        DMD2(other, steps=2, fake_score_knows_step=True)


def test_evaluations_of_a_mean_flows_teacher_count(tmp_path):
    made = MeanFlow(denoiser(), optimizer=adam)
    with EvaluationCounter(made.teacher) as counter:
        trainer(tmp_path, max_steps=2).fit(made, Digits(batch_size=16))
    assert counter.samples == made.teacher_evaluations == 32


def test_several_averages_at_once(tmp_path):
    made = dmd_module(ema_decay=0.5, further_ema_decays=(0.1, 0.99))
    alone = {}
    for decay in (0.1, 0.99):
        other = dmd_module(ema_decay=decay)
        trainer(tmp_path, max_steps=4).fit(other, Digits())
        alone[decay] = weights(other.network)
    run = trainer(tmp_path, ExportPipeline(), max_steps=4)
    run.fit(made, Digits())
    own = weights(made.network)
    for decay, expected in alone.items():
        with made.sampled_with(decay):
            assert equal(weights(made.network), expected)
        exported = load_denoiser(tmp_path / f"pipeline-ema-{decay:g}")
        assert equal(exported.state_dict(), expected)
    assert equal(weights(made.network), own)
    assert equal(load_denoiser(tmp_path / "pipeline").state_dict(), own)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = dmd_module(ema_decay=0.5, further_ema_decays=(0.1, 0.99))
    again.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    with again.sampled_with(0.99):
        assert equal(weights(again.network), alone[0.99])


@pytest.mark.parametrize(
    "made",
    [
        lambda: module(DMD2, steps=2, further_ema_decays=(0.9,)),
        lambda: module(MultiBoundaryConsistencyDistillation, further_ema_decays=(0.9,)),
        lambda: module(ProgressiveDistillation, further_ema_decays=(0.9,)),
    ],
)
def test_all_averages_are_sampled_as_the_student_is(made):
    made = made()
    with made.sampled_with(0.9):
        assert made.network.few_steps == made.student.few_steps is not None


def test_ddp_leaves_averages_on_another_device_alone(tmp_path):
    """Weights on two devices are what it refuses else."""
    made = module(DMD, ema_device="meta", further_ema_decays=(0.9,))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        DistributedDataParallel(made)
        del made._ddp_params_and_buffers_to_ignore
        with pytest.raises(ValueError, match="same type of devices"):
            DistributedDataParallel(made)
    finally:
        torch.distributed.destroy_process_group()


def test_an_adapter_is_exported_beside_the_merged_weights(tmp_path):
    made = module(DMD, lora=LoRA(rank=2))
    trainer(tmp_path, ExportPipeline(adapter=True), max_steps=2).fit(made, Digits())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    noise, label = torch.randn(3, 1, 8, 8), torch.arange(3)
    found = sample(load_denoiser(tmp_path / "pipeline"), noise, steps=1, condition=label)
    torch.testing.assert_close(found, made.generate(noise, label), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"has no adapter. Set the method's option lora"):
        trainer(tmp_path, ExportPipeline(adapter=True), max_steps=2).fit(dmd_module(), Digits())


@pytest.mark.parametrize("kind", [DMD2, SiD])
def test_all_methods_with_a_fake_score_take_adapters(kind, tmp_path):
    made = module(kind, lora=LoRA(rank=2), teacher_precision="bfloat16", **JUDGED)
    teacher, before = weights(made.teacher), weights(made)
    trainer(tmp_path, max_steps=2).fit(made, Digits())
    moved = {name for name, value in weights(made).items() if not torch.equal(value, before[name])}
    for part in ("student", "fake_score", "discriminator"):
        names = {f"{part}.{name}" for name, _ in getattr(made, part).named_parameters()}
        assert names and names <= moved
    assert equal(teacher, weights(made.teacher))
