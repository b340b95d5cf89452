import warnings
from contextlib import contextmanager

import pytest
from tiny import denoiser, epsilon, teacher_module, trainer

from lit_distill.callbacks import PairWriter
from lit_distill.datamodules import DigitsDataModule
from lit_distill.models import save_denoiser

KNOWN = (
    "Attribute '.*",  # modules given as objects, which checkpoints leave out of the settings
    r"Found \d+ module",  # in eval mode, on purpose
    ".*treespec, LeafSpec.*",
    "Using ModelCheckpoint with manual optimization",  # the weights after the step are wanted
)


@contextmanager
def without_known_warnings():
    with warnings.catch_warnings():
        for words in KNOWN:
            warnings.filterwarnings("ignore", words)
        yield


@pytest.fixture(autouse=True)
def quiet_and_seeded(monkeypatch):
    # Set first, so that what a command line leaves in the environment is taken back.
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    with without_known_warnings():
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a teacher, 88 pairs that it made: 11 batches of 8; and a DDPM teacher."""
    folder = tmp_path_factory.mktemp("world")
    save_denoiser(denoiser(), folder / "teacher")
    save_denoiser(epsilon(), folder / "epsilon")
    data = DigitsDataModule(predict_samples=88, predict_batch_size=30)
    with without_known_warnings():
        trainer(folder, PairWriter(str(folder / "pairs"))).predict(teacher_module(), data)
    return folder
