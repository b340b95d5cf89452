"""The arithmetic of benchmarks/memory_text.py, from which docs/text_to_image.md has its table."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import memory_text

TINY = {
    "sample_size": memory_text.LATENT,
    "cross_attention_dim": 16,
    "block_out_channels": (32, 32, 32, 32),
}


def test_the_real_network_is_that_of_stable_diffusion():
    assert memory_text.parameters(memory_text.REAL) == 859_520_964


@pytest.mark.parametrize("name", ["LCM, full", "LCM-LoRA, backbone in bf16", "DMD, LoRA"])
def test_what_is_computed_is_what_is_counted(name, monkeypatch):
    monkeypatch.setattr(memory_text, "REDUCED", TINY)
    choice = memory_text.CHOICES[name]
    counted = memory_text.measure(choice, batch_size=2, precision="32-true")
    computed = memory_text.compute(choice, TINY)
    assert counted["trained"] == computed["trained"]
    for part in ("weights_mb", "gradients_mb", "optimizer_mb", "average_mb"):
        assert counted[part] == pytest.approx(computed[part], rel=2e-3)  # counters of steps
