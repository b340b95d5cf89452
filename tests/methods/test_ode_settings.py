"""Settings and data of the ODE-based methods that cannot work, each with a sentence."""

import shutil
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import (
    CD,
    CTM,
    PD,
    SFD_2,
    Digits,
    denoiser,
    dmd_module,
    module,
    trainer,
)
from torchvision.models import squeezenet1_1

from lit_distill.callbacks import PairWriter
from lit_distill.datamodules import DigitsDataModule, PairsDataModule
from lit_distill.diffusion import EpsilonDenoiser, FlowDenoiser, GaussianMixtureDenoiser
from lit_distill.losses import LPIPS
from lit_distill.methods import (
    SFD,
    ConsistencyDistillation,
    ConsistencyTraining,
    ConsistencyTrajectory,
    KnowledgeDistillation,
    MultiBoundaryConsistencyDistillation,
    ProgressiveDistillation,
    TrajectoryDistillation,
)

CONSISTENCY = [ConsistencyDistillation, MultiBoundaryConsistencyDistillation]
DISTANCES = [KnowledgeDistillation, TrajectoryDistillation, SFD, *CONSISTENCY]
DISTANCES += [ConsistencyTraining, ConsistencyTrajectory]
SOLVERS = [KnowledgeDistillation, TrajectoryDistillation, SFD, *CONSISTENCY, ConsistencyTrajectory]
BOUNDARIES = MultiBoundaryConsistencyDistillation


def refused(kind, words, **options):
    with pytest.raises(ValueError, match=words):
        module(kind, **options)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        *[(kind, {"teacher_solver": "x"}, "solver='x' is unknown; .* heun") for kind in SOLVERS],
        *[(kind, {"distance": "l7"}, "distance='l7' is unknown; .* lpips") for kind in DISTANCES],
        *[(kind, {"target": "x"}, "target='x' is unknown; choose stop") for kind in CONSISTENCY],
        *[(kind, {"target_decay": 1.0}, "target_decay=1.0 is no share") for kind in CONSISTENCY],
        *[(kind, {"num_nodes": 1}, "num_nodes=1.*at least 2 nodes") for kind in CONSISTENCY],
        (KnowledgeDistillation, {"generator_sigma": 90.0}, r"generator_sigma=90.0 is outside"),
        (
            KnowledgeDistillation,
            {"online": True, "teacher_steps": 0},
            "steps=0: .* at least one step",
        ),
        (TrajectoryDistillation, {"steps": 0}, "steps=0: .* at least one step"),
        (TrajectoryDistillation, {"teacher_substeps": 0}, "cannot be cut into 0 parts"),
        (TrajectoryDistillation, {"sigma_min": 90.0}, "sigma_min=90.0 and sigma_max=80.0"),
        (SFD, {"steps": []}, "steps is an empty list"),
        (SFD, {"steps": 0}, "steps=0: .* at least one step|no numbers of steps"),
        (SFD, {"steps": [4, 0]}, "steps=0: .* at least one step|no numbers of steps"),
        (SFD, {"teacher_substeps": 0}, "teacher_substeps=0"),
        (SFD, {"sigma_min": 0.0}, "sigma_min=0.0 and sigma_max=80.0"),
        (SFD, {"accumulate": 0}, "accumulate=0: a batch has at least 1 part"),
        (ConsistencyTraining, {"q": 1.0}, "q=1.0.* q must be above 1"),
        (ConsistencyTraining, {"stage_updates": 0}, "stage_updates=0.* at least one update"),
        (ConsistencyTrajectory, {"num_nodes": 1}, "num_nodes=1.* at least 2 nodes"),
        (ConsistencyTrajectory, {"max_teacher_steps": 0}, "max_teacher_steps=0.* at least 1 step"),
        (ConsistencyTrajectory, {"inner_target": "x"}, "inner_target='x' is unknown; choose stop"),
        (ConsistencyTrajectory, {"target_decay": -0.1}, "target_decay=-0.1 is no share"),
        (ConsistencyTrajectory, {"gamma": 1.1}, "gamma=1.1 .*between 0 and 1"),
        (ConsistencyTrajectory, {"gamma": -0.5}, "gamma=-0.5 .*between 0 and 1"),
        (ConsistencyTrajectory, {"steps": []}, "steps is an empty list"),
    ],
)
def test_settings_that_cannot_work(kind, options, words):
    refused(kind, words, **options)


@pytest.mark.parametrize("options", [{"teacher_steps": 6}, {"teacher_steps": 1}, {"steps": 0}])
def test_steps_that_cannot_be_halved(options):
    wanted = {"teacher_steps": 8, "steps": 1, **options}
    words = f"teacher_steps={wanted['teacher_steps']} cannot be halved down to steps="
    refused(ProgressiveDistillation, f"{words}{wanted['steps']}: .*times 2, 4, 8", **wanted)


@pytest.mark.parametrize("updates", [[5, 5], [5, 5, 5, 5], [], 0, [5, 0, 5]])
def test_updates_that_do_not_fit_the_stages(updates):
    words = r"from teacher_steps=8 to steps=1 there are 3 stages; give one positive number"
    refused(ProgressiveDistillation, words, teacher_steps=8, steps=1, updates=updates)


@pytest.mark.parametrize(
    ("boundaries", "words"),
    [
        (0, r"boundaries=0: a grid of 6 nodes has room for 1 to 5 .*num_nodes"),
        (6, r"boundaries=6: a grid of 6 nodes has room for 1 to 5 .*num_nodes"),
        ([], "must descend and end at 0"),
        ([2.5], "must descend and end at 0"),
        ([0.1698, 2.515, 0.0], "must descend and end at 0"),
        ([2.515, 2.515, 0.0], r"has a level twice"),
        ([100.0, 0.0], r"100.0 is outside the noise levels between 0.002 and 80"),
        ([80.0, 0.0], r"80.0 is outside the noise levels"),
        ([0.001, 0.0], r"0.001 is outside the noise levels"),
        ([2.0, 0.0], r"2.0 is no node .* nodes are [\d., ]+ \(option num_nodes\)"),
    ],
)
def test_boundaries_that_cannot_work(boundaries, words):
    refused(BOUNDARIES, words, **CD, boundaries=boundaries)


@pytest.mark.parametrize("kind", [*CONSISTENCY, ConsistencyTraining])
def test_consistency_models_have_edms_scalings(kind):
    other = FlowDenoiser(denoiser().network)
    words = "needs EDM's scalings, and a FlowDenoiser has others.*EDMDenoiser"
    with pytest.raises(ValueError, match=words):
        kind(other, distance="l2")


@pytest.mark.parametrize("kind", CONSISTENCY)
def test_consistency_models_have_images_in_the_usual_range(kind):
    other = EpsilonDenoiser(denoiser().network, image_range=(0, 1))
    with pytest.raises(ValueError, match=r"trained on images in \[0.0, 1.0\].*in \[-1, 1\]"):
        kind(other, distance="l2")


def test_any_teacher_where_the_student_has_edms_scalings(tmp_path):
    teacher = EpsilonDenoiser(denoiser().network)
    student = ConsistencyDistillation(teacher, distance="l2", student=denoiser(1), **CD)
    trainer(tmp_path, max_steps=1).fit(student, Digits())
    assert student.teacher is teacher


@pytest.mark.parametrize("kind", [SFD, ConsistencyTrajectory])
def test_a_closed_form_cannot_be_told_anything(kind):
    steps = [1, 2]
    closed = GaussianMixtureDenoiser(torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match=r"has no network.*option student"):
        kind(closed, steps=steps, distance="l2")


def test_lpips_does_not_look_at_tiny_images(tmp_path):
    path = tmp_path / "squeeze.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    distance = LPIPS("squeeze", resize=None, weights=path)
    student = module(KnowledgeDistillation, distance=distance)
    fails(tmp_path, student, Digits(), r"\(8, 8\) pixels: set .* `resize` to 32 or more")


def fails(tmp_path, student, data, words):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, max_steps=1).fit(student, data)


def test_knowledge_distillation_needs_noise(tmp_path):
    words = "needs noise-image pairs.*PairsDataModule.*online to true"
    fails(tmp_path, module(KnowledgeDistillation), DigitsDataModule(), words)


def test_steps_between_untrained_boundaries_are_refused():
    student = module(BOUNDARIES, **CD, boundaries=3)
    noise, label = torch.randn(2, 1, 8, 8), torch.arange(2)
    assert student.generate(noise, label).shape == noise.shape
    with pytest.raises(ValueError, match=r"steps=2: .* samples in 3 step\(s\) only"):
        student.generate(noise, label, 2)


@pytest.mark.parametrize(
    ("kind", "options", "trained"),
    [
        (SFD, SFD_2, "2"),
        (SFD, {"steps": [4, 2]}, "4, 2"),
        (KnowledgeDistillation, {}, "1"),
        (ProgressiveDistillation, PD, "4"),  # a validation asks every stage for the last's steps
        (TrajectoryDistillation, {"steps": 2}, "2"),
        (ConsistencyTrajectory, CTM, "1, 2"),
        (ConsistencyDistillation, CD, "1, 2"),
    ],
)
def test_untrained_steps_are_told(kind, options, trained):
    student, noise, label = module(kind, **options), torch.randn(2, 1, 8, 8), torch.arange(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student.generate(noise, label)
    with pytest.warns(UserWarning, match=rf"trained for {trained} step\(s\), not for 3"):
        assert student.generate(noise, label, 3).isfinite().all()


def test_stages_are_not_compared_by_a_checkpoint(tmp_path):
    watching = ModelCheckpoint(tmp_path, monitor="fd_digits")
    staged = module(ProgressiveDistillation, **PD)
    with pytest.raises(ValueError, match=r"best weights by fd_digits: .* more steps .*monitor out"):
        trainer(tmp_path, watching, enable_checkpointing=True).fit(staged, Digits(batch_size=4))


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories")
    data = DigitsDataModule(predict_samples=8, predict_batch_size=4)
    trainer(folder, PairWriter(str(folder))).predict(module(SFD, **SFD_2), data)
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 3}, r"made in another way \(sigmas: \[80.*folder by `lit-distill predict`"),
        ({"sigma_min": 0.1}, r"made in another way \(sigmas: \[80"),
        ({"teacher_substeps": 4}, r"made in another way \(substeps: 2, not 4\)"),
        ({"teacher_solver": "heun"}, r"made in another way \(solver: dpmpp_3m, not heun\)"),
        ({"analytical_first_step": True}, "analytical_first_step: False, not True"),
        ({"steps": [2, 3]}, r"for one number of steps, not for \[2, 3\]: set steps to one"),
    ],
)
def test_stored_trajectories_made_in_another_way(options, words, tmp_path, trajectories):
    data = PairsDataModule(DigitsDataModule(), str(trajectories), batch_size=4)
    fails(tmp_path, module(SFD, **{**SFD_2, **options}), data, words)


def test_stored_trajectories_of_another_teacher(tmp_path, trajectories):
    data = PairsDataModule(DigitsDataModule(), str(trajectories), batch_size=4)
    words = "made by another teacher .*option teacher"
    fails(tmp_path, SFD(denoiser(1), distance="l2", **SFD_2), data, words)


def test_trajectories_of_several_grids_cannot_be_written(tmp_path):
    student = module(SFD, steps=[2, 3])
    data = DigitsDataModule(predict_samples=8, predict_batch_size=4)
    with pytest.raises(ValueError, match=r"for one number of steps, not for \[2, 3\]"):
        trainer(tmp_path, PairWriter(str(tmp_path / "new"))).predict(student, data)
    assert not (tmp_path / "new").exists()


def test_trajectories_are_completed_with_the_same_settings_only(tmp_path, trajectories):
    folder = tmp_path / "copy"
    shutil.copytree(trajectories, folder)
    (folder / "shard-00001.safetensors").unlink()
    data = DigitsDataModule(predict_samples=8, predict_batch_size=4)
    student = module(SFD, **{**SFD_2, "teacher_substeps": 1})
    with pytest.raises(ValueError, match=r"made in another way .*'substeps': 2.*not .*: 1"):
        trainer(tmp_path, PairWriter(str(folder))).predict(student, data)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_networks_in_turn_need_a_strategy_that_looks(strategy):
    """Else Lightning's RuntimeError about unused parameters comes in the second step."""
    words = "DMD trains student and fake_score in turn.*ddp_find_unused_parameters_true"
    with pytest.raises(ValueError, match=words):
        set_up(dmd_module(), strategy)


@pytest.mark.parametrize("name", ["find_unused_parameters_true", "find_unused_parameters_false"])
def test_one_network_works_with_any(name):
    set_up(dmd_module(), "ddp_find_unused_parameters_true")
    for kind, options in [(SFD, SFD_2), (ConsistencyTrajectory, CTM)]:
        set_up(module(kind, **options), f"ddp_{name}")


def set_up(student, strategy):
    """What Lightning does in each of two processes."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = Trainer(accelerator="cpu", devices=2, strategy=strategy, **quiet)
    run.strategy.set_world_ranks()
    assert run.world_size == 2
    student._trainer = run
    student.setup("fit")
