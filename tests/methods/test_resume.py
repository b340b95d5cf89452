"""A run that is killed in the middle of an epoch and goes on ends with the bits of an unbroken one.

Eleven batches make an epoch here. A checkpoint is written every five steps and the kill comes at
step 18, so that step 16 to 18 are lost and made again from the middle of the second epoch. The
second stage of progressive distillation begins at step 12. SFD has two steps a batch, so that its
checkpoints are ten steps apart.
"""

import signal

import pytest
import torch
from alone import run_alone
from tiny import METHODS, write_config

from lit_distill.main import main

SAVER = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"filename": "last", "every_n_train_steps": 5},
}
# Right where checkpoints are written, as the configs have it.
VALIDATION = {"val_check_interval": 5, "check_val_every_n_epoch": None, "limit_val_batches": 1}
# One of each training pattern: automatic, alternating, staged, several updates a batch. Where it
# is killed, which step is left then, and where it ends.
PATTERNS = {"teacher": (18, 15, 25), "dmd": (18, 15, 25), "pd": (18, 15, 25), "sfd": (28, 20, 40)}
every_pattern = pytest.mark.parametrize("method", PATTERNS)


def last(root):
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


def equal(a, b):
    """Whether two nested structures hold the same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def fit(tmp_path, name, method, world, *arguments, callbacks=(SAVER,)):
    root = tmp_path / name
    options = {"max_steps": PATTERNS[method][-1], "callbacks": list(callbacks), **VALIDATION}
    config = write_config(tmp_path / f"{name}.yaml", root, METHODS[method], world, **options)
    return root, ["fit", "--config", str(config), *arguments]


@every_pattern
def test_killed_and_resumed_equals_unbroken(method, tmp_path, world):
    kill_at, left_at, end = PATTERNS[method]
    unbroken, command = fit(tmp_path, "unbroken", method, world)
    assert main(command) == 0

    kill = {"class_path": "tiny.KillAt", "init_args": {"step": kill_at}}
    killed, command = fit(tmp_path, "killed", method, world, callbacks=[kill, SAVER])
    result = run_alone(command)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = last(killed)
    assert left["global_step"] == left_at
    assert not equal(left["state_dict"], last(unbroken)["state_dict"])

    _, command = fit(tmp_path, "killed", method, world, "--ckpt_path", "last")
    assert main(command) == 0
    ours, theirs = last(killed), last(unbroken)
    assert ours["global_step"] == theirs["global_step"] == end
    assert any(key.startswith("previous.") for key in left["state_dict"]) == (method == "pd")
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert ours[part] and equal(ours[part], theirs[part]), part
    spent = [checkpoint["spent"]["teacher_evaluations"] for checkpoint in (ours, theirs)]
    assert spent[0] == spent[1]
    assert any(key.startswith("ema.") for key in ours["state_dict"])


@every_pattern
def test_the_seed_decides(method, tmp_path, world):
    """Without this the test above could hold for a training that draws nothing at all."""
    states = []
    for seed in (0, 1):
        root, command = fit(tmp_path, f"seed{seed}", method, world, "--trainer.max_steps", "10")
        assert main([*command, "--seed_everything", str(seed)]) == 0
        states.append(last(root)["state_dict"])
    assert not equal(*states)
