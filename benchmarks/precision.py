"""Which of Lightning's precisions trains the digits' network faster on this machine.

    python benchmarks/precision.py

Prints ``bf16-mixed`` or ``32-true``, for ``--trainer.precision``, and on stderr the milliseconds of
a pass with its gradient. On one Xeon bfloat16 trained small U-Nets 1.7 to 2.0 times as fast as
float32, on another the digits' networks slower by an eighth to a third.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import sys
import time
from statistics import median

import torch

from lit_distill.diffusion import EDMDenoiser
from lit_distill.models import UNet

REPEATS = 7
GAIN = 0.9  # float32 is kept unless bfloat16 takes at most this share of its time


def main() -> None:
    """Time both in turn, on the device that Lightning would choose."""
    torch.set_num_threads(1)  # which other work on the machine does not slow down out of proportion
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"add_attention": False}
    network = UNet(8, 1, 10, [16, 32], layers_per_block=1, norm_num_groups=8, options=options)
    denoiser = EDMDenoiser(network).to(device)
    x, sigma = torch.randn(128, 1, 8, 8, device=device), torch.ones(128, device=device)
    labels = torch.arange(128, device=device) % 10

    def milliseconds(bfloat16: bool) -> float:
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            made = denoiser(x, sigma, labels)
        made.square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - begin)

    times = [(milliseconds(False), milliseconds(True)) for _ in range(3 + REPEATS)][3:]
    float32, bfloat16 = (median(column) for column in zip(*times, strict=True))
    print(f"float32 {float32:.0f} ms, bfloat16 {bfloat16:.0f} ms", file=sys.stderr)
    print("bf16-mixed" if bfloat16 < GAIN * float32 else "32-true")


if __name__ == "__main__":
    main()
