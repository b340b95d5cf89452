"""torchvision beside a torch whose build its extension does not fit (a CPU build, for instance)."""

import subprocess
import sys

import pytest
import torch


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.fixture(scope="module")
def extension_fits() -> bool:
    """Whether torchvision can be imported here without help."""
    bare = run("import torchvision")
    assert bare.returncode == 0 or "torchvision::nms does not exist" in bare.stderr, bare.stderr
    return bare.returncode == 0


def test_everything_can_be_imported_after_lit_distill() -> None:
    ended = run("import lit_distill, torchvision, torchmetrics, lightning, lpips, diffusers")
    assert ended.returncode == 0, ended.stderr


def test_the_shim_is_what_helps(extension_fits: bool) -> None:
    """Without the shim the import fails exactly where the extension does not load."""
    off = "import sys, types; m = types.ModuleType('lit_distill._torchvision_ops')\n"
    off += "m.define_missing_torchvision_ops = lambda: None\n"
    off += "sys.modules['lit_distill._torchvision_ops'] = m\n"
    assert (run(off + "import lit_distill, torchvision").returncode == 0) == extension_fits


def test_a_compiled_operator_is_left_alone(extension_fits: bool) -> None:
    code = "import lit_distill; from torchvision.ops import nms; import torch\n"
    code += "print(nms(torch.tensor([[0., 0, 1, 1]]), torch.ones(1), 0.5).tolist())"
    ended = run(code)
    if extension_fits:
        assert ended.stdout == "[0]\n", ended.stderr
    else:  # torchvision says so itself, instead of answering something
        assert "Couldn't load custom C++ ops" in ended.stderr


def test_it_may_be_called_again() -> None:
    from lit_distill._torchvision_ops import define_missing_torchvision_ops

    define_missing_torchvision_ops()
    assert hasattr(torch.ops.torchvision, "nms")
