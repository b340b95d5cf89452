"""The run doctor on planted faults and on healthy runs, with points in the plane."""

import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_distill.callbacks import RunDoctor
from lit_distill.datamodules import CaptionedDigits, CaptionedFolder, LatentTextDataModule
from lit_distill.diffusion import EDMDenoiser, LogNormalSigma
from lit_distill.methods import DMD, DMD2, SFD, DiffusionTeacher

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("methods", "models")]
from plane import SIGMA_MAX, SIGMA_MIN, Perceptron, Points, truth
from small_text import text_folder
from tiny import METHODS, Digits, dmd_module, module, teacher_module, trainer

RATE, UPDATES = 1e-3, 300


def adam(rate):
    return partial(torch.optim.Adam, lr=rate, betas=(0.0, 0.99))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small network that was trained as a denoiser of the points."""
    torch.manual_seed(0)
    network = Perceptron(64)
    network.feature_layers = ("layers.2",)
    student = EDMDenoiser(network, SIGMA_MIN, SIGMA_MAX, sigma_data=1.4, time_scale=1.0)
    module = DiffusionTeacher(
        student, LogNormalSigma(0.0, 1.5), optimizer=adam(2e-3), ema_decay=0.99
    )
    folder = tmp_path_factory.mktemp("start")
    data = Points(512, image=truth().draw(20_000))
    trainer(folder, max_steps=800, limit_val_batches=0).fit(module, data)
    return module.network


class StopAt(Callback):
    """Ends a run at a finding, as the rest of it would say no more."""

    def __init__(self, doctor, sign):
        self.doctor, self.sign = doctor, sign

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = any(finding.sign == self.sign for finding in self.doctor.findings)


def watched(start, folder, updates=UPDATES, until=None, **options):
    """Findings of a run."""
    torch.manual_seed(0)
    settings = {
        "student": start,
        "fake_score": start,
        "optimizer": adam(RATE),
        "update_ratio": 3,
        "adversarial_weight": 0.03,
        "discriminator_weight": 0.1,
        "clip": 10.0,
    }
    module = DMD2(truth(), **{**settings, **options})
    doctor = RunDoctor()
    stop = StopAt(doctor, until)
    run = trainer(folder, doctor, stop, max_steps=updates, limit_val_batches=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.fit(module, Points(256, image=truth().draw(20_000)))
    spoken = [str(w.message) for w in said if "Run doctor" in str(w.message)]
    assert len(spoken) == len(doctor.findings)
    return doctor.findings


@pytest.mark.parametrize("updates", [500, pytest.param(1_000, marks=pytest.mark.full)])
def test_a_healthy_run_is_left_alone(updates, start, tmp_path):
    assert watched(start, tmp_path, updates=updates) == []


def test_a_frozen_fake_score(start, tmp_path):
    findings = watched(start, tmp_path, until="fake_change", fake_optimizer=adam(0.0))
    assert findings[0].sign == "fake_change"
    assert "does not change at all" in findings[0].advice and "fake_optimizer" in findings[0].advice
    assert findings[0].step <= UPDATES


def test_a_learning_rate_20_times_too_high(start, tmp_path):
    findings = watched(start, tmp_path, until="unrest", optimizer=adam(20 * RATE))
    signs = {finding.sign: finding for finding in findings}
    assert "unrest" in signs and "learning rate is too high" in signs["unrest"].advice


def test_a_discriminator_too_strong(start, tmp_path):
    """It learns 500 times as fast as the student, and looks at samples with hardly any noise."""
    findings = watched(
        start,
        tmp_path,
        until="win_rate",
        discriminator_weight=100.0,
        optimizer=adam(1e-5),
        fake_optimizer=adam(5e-3),
        noise_range=(0.0, 0.02),
    )
    signs = {finding.sign: finding for finding in findings}
    assert "win_rate" in signs and "discriminator is too strong" in signs["win_rate"].advice


def test_all_signs_are_logged_and_findings_outlast_a_restart(tmp_path):
    doctor = RunDoctor(every_n_steps=2, num_samples=4, warm_up=0, patience=1)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = dmd_module(clip=1e-6)
    options = {"logger": logger, "log_every_n_steps": 1}
    run = trainer(tmp_path, doctor, max_steps=6, **options)
    with pytest.warns(UserWarning, match=r"Run doctor, update 2: 100% of the student's gradients"):
        run.fit(module, Digits())
    run.save_checkpoint(tmp_path / "a.ckpt")
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {tag.removeprefix("doctor/") for tag in events.Tags()["scalars"] if "doctor/" in tag}
    expected = {"fake_lag", "fake_change", "outside", "spread", "unrest", "clipped", "gradient"}
    assert found == expected
    assert len(events.Scalars("doctor/unrest")) >= 3
    other = RunDoctor()
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    other.load_state_dict(next(v for k, v in state.items() if "RunDoctor" in k))
    assert other.findings == doctor.findings
    assert "clipped" in {finding.sign for finding in other.findings}


def test_it_changes_no_number_of_the_run(tmp_path):
    states = []
    for callbacks in ([], [RunDoctor(every_n_steps=1, num_samples=4)]):
        module = dmd_module()
        trainer(tmp_path, *callbacks, max_steps=3).fit(module, Digits())
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_method_of_one_network_has_the_signs_that_it_can_have(tmp_path):
    doctor = RunDoctor(every_n_steps=1, num_samples=4)
    run = trainer(tmp_path, doctor, max_steps=2)
    run.fit(teacher_module(), Digits())
    found = {name for name in run.callback_metrics if name.startswith("doctor/")}
    assert found == {"doctor/outside", "doctor/spread", "doctor/unrest"}


@pytest.mark.parametrize("images", [True, False])
def test_text_to_image_is_looked_at_with_prompts(images, tmp_path):
    folder = text_folder(tmp_path / "teacher")
    source = CaptionedDigits()
    if not images:
        (tmp_path / "metadata.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        source = CaptionedFolder(str(tmp_path), images=False)
    data = LatentTextDataModule(source, folder, str(tmp_path / "cache"), batch_size=2)
    doctor = RunDoctor(every_n_steps=1, num_samples=3)
    run = trainer(tmp_path, doctor, max_steps=2)
    run.fit(DMD(folder, regression_weight=0.0), data)
    logged = {n: v for n, v in run.callback_metrics.items() if n.startswith("doctor/")}
    of_images = {"doctor/outside", "doctor/spread", "doctor/unrest"}
    assert {"doctor/fake_lag", "doctor/gradient"} < set(logged)
    assert of_images & set(logged) == (of_images if images else set())
    assert all(value.isfinite() for value in logged.values())


class Noting(RunDoctor):
    """Keeps the updates that it looked at, and the most steps that it remembered."""

    def on_fit_start(self, trainer, pl_module):
        self.looks, self.most = [], 0

    def on_train_batch_end(self, *args, **kwargs):
        super().on_train_batch_end(*args, **kwargs)
        self.most = max(self.most, len(self._steps))

    def _judge(self, trainer, signs):
        self.looks.append(trainer.global_step)


@pytest.mark.parametrize(
    ("make", "every", "limit", "looks"),
    [
        (dmd_module, 3, 7, [3, 6]),
        # Four updates a batch: the first ends that reach 5, 10, 15 and 20.
        (lambda: module(SFD, steps=4, teacher_substeps=1), 5, 24, [8, 12, 16, 20]),
        # Batches end at 2, 4, 6, 8, 11, 13: that of 11 was expected to end at 10.
        (METHODS["sfd_v"].make, 11, 15, [13]),
    ],
    ids=["one", "four", "varying"],
)
def test_batches_of_several_updates_are_looked_at(make, every, limit, looks, tmp_path):
    doctor = Noting(every_n_steps=every, num_samples=4)
    trainer(tmp_path, doctor, max_steps=limit, limit_val_batches=0).fit(make(), Digits())
    assert doctor.looks == looks
    assert doctor.most < every


@pytest.mark.parametrize(
    "options", [{"every_n_steps": 0}, {"num_samples": 1}, {"warm_up": -1}, {"patience": 0}]
)
def test_numbers_that_are_too_small(options):
    with pytest.raises(ValueError, match="RunDoctor cannot work with"):
        RunDoctor(**options)
