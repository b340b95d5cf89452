"""What checkpoints hold and leave out, for every method, and that bad weights never reach one."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Digits, Disturb, dmd_module, every_method, trainer, write_config

from lit_distill.diffusion import seeded_noise
from lit_distill.main import main
from lit_distill.methods import base
from lit_distill.models import load_denoiser, merged


def samples(module):
    source = torch.Generator().manual_seed(0)  # some students add noise between their steps
    noise = seeded_noise((1, 8, 8), range(6))
    return module.generate(noise, torch.arange(6), generator=source)


@every_method
def test_round_trip_of_a_command_line_run(row, tmp_path, world):
    export = {"class_path": "lit_distill.callbacks.ExportPipeline"}
    options = {"max_steps": 3, "callbacks": [export]}
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", row, world, **options)
    assert main(["fit", "--config", str(config)]) == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    kind = type(row.make())
    module = kind.load_from_checkpoint(path, weights_only=True)
    assert module.ema_decay == 0.999 and int(module.ema.n_averaged) == row.after(3)[-1]
    exported = load_denoiser(tmp_path / "run" / "pipeline")
    assert exported.fingerprint() == merged(module.network).fingerprint()
    assert exported.fingerprint() != load_denoiser(world / row.teacher).fingerprint()
    again = kind.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(samples(module), samples(again))
    if module.teacher is not None:
        expected = load_denoiser(world / row.teacher).fingerprint()
        assert (module.teacher.original or module.teacher.fingerprint()) == expected


@every_method
def test_round_trip_of_objects_without_the_frozen_weights(row, tmp_path):
    module = row.make()
    run = trainer(tmp_path, max_steps=3)
    run.fit(module, Digits())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = row.make()
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    other.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(samples(module), samples(other))
    held = list(checkpoint["state_dict"].values())
    for name in module.frozen_modules():
        part = getattr(module, name, None)
        frozen = [] if part is None else [p for p in part.parameters() if p.numel() > 1]
        assert not any(a.shape == b.shape and torch.equal(a, b) for a in frozen for b in held)
    lost = next(name for name in checkpoint["state_dict"] if name.startswith("student."))
    del checkpoint["state_dict"][lost]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{lost}"):
        row.make().load_state_dict(checkpoint["state_dict"])


@pytest.fixture
def save_every_4(tmp_path, monkeypatch):
    """A trainer whose module looks at its losses when it is saved, and not before."""
    monkeypatch.setattr(base, "_CHECK_EVERY", 1_000)
    saver = ModelCheckpoint(tmp_path, "last", every_n_train_steps=4)
    return trainer(tmp_path, saver, max_steps=40, enable_checkpointing=True)


def second_save(row):
    """Student updates at the second checkpoint of those."""
    return next(step for step in row.after(40) if step > 4 and step % 4 == 0)


@every_method
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    row, tmp_path, save_every_4
):
    words = rf"loss is not finite near step {second_save(row)}\b.*ckpt_path last"
    with pytest.raises(FloatingPointError, match=words):
        save_every_4.fit(broken(row.make(), from_step=5), Digits())
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 4
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


@every_method
def test_a_loss_that_is_not_finite_stops_a_run_without_checkpoints(row, tmp_path, monkeypatch):
    """In the end at the latest: what is exported then is not made of it."""
    make = row.make
    monkeypatch.setattr(base, "_CHECK_EVERY", 1_000)
    with pytest.raises(FloatingPointError, match="loss is not finite"):
        trainer(tmp_path, max_steps=3).fit(broken(make(), from_step=2), Digits())
    monkeypatch.setattr(base, "_CHECK_EVERY", 5)
    long = trainer(tmp_path, max_steps=50)
    with pytest.raises(FloatingPointError, match="loss is not finite"):
        long.fit(broken(make(), from_step=0), Digits())
    assert long.global_step < 10


def broken(module, from_step):
    """Let the student answer NaN from some step on."""
    module.student.network.register_forward_hook(
        lambda _, args, out: out * float("nan" if module.global_step >= from_step else 1)
    )
    return module


@every_method
def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(row, tmp_path, save_every_4):
    module = row.make()
    parameter = next(module.student.parameters())
    parameter.register_hook(
        lambda gradient: gradient * float("nan" if module.global_step == 6 else 1)
    )
    words = rf"(weights are|loss is) not finite near step {second_save(row)}\b"
    with pytest.raises(FloatingPointError, match=words):
        save_every_4.fit(module, Digits())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 1), (2.0, 2)])
def test_the_teacher_evaluations_of_training_are_counted_over_restarts(tmp_path, guidance, calls):
    def run(module, steps, path=None):
        saver = trainer(tmp_path, Disturb(), max_steps=steps)
        saver.fit(module, Digits(), ckpt_path=path)
        return saver

    module = dmd_module(guidance=guidance, accumulate=2)
    run(module, 3).save_checkpoint(tmp_path / "a.ckpt")
    assert module.teacher_evaluations == 3 * 16 * calls
    assert not any(part._forward_hooks for part in module.modules())
    again = dmd_module(guidance=guidance, accumulate=2)
    run(again, 5, tmp_path / "a.ckpt")
    assert again.teacher_evaluations == 5 * 16 * calls
    assert again.train_seconds > module.train_seconds > 0
