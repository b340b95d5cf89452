"""What all tests share: a command line as users call it, on a machine with few cores."""

import os  # isort: skip

# Before MKL is loaded: on CPUs of other makers its products depend on where a matrix lies in memory
# otherwise, and nothing is equal to the bit.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import lit_distill  # isort: skip  (before all else: it lets torchvision be imported)

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ended import Command, Ended
from torchvision.models.vgg import cfgs, make_layers

from lit_distill.main import main

torch.set_num_threads(1)  # the workers of pytest-xdist share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, or one worker would be left with them in the end."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """A DDP strategy leaves its process group, and its port in the environment of later tests."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """``command("fit", "--config", ...)`` runs ``lit-distill fit --config ...`` in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    # Set first, so that what Lightning leaves in the environment is taken back.
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("LIT_DISTILL_DEBUG", raising=False)

    def run(*args: object) -> Ended:
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        return Ended(status, *capsys.readouterr())

    with torch.random.fork_rng():
        yield run


@pytest.fixture
def version() -> str:
    """The installed version."""
    return lit_distill.__version__


@pytest.fixture(scope="session")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LPIPS's backbone with random weights, without the classifier."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    features = make_layers(cfgs["D"]).state_dict()
    torch.save({f"features.{name}": tensor for name, tensor in features.items()}, path)
    return path
