"""One healthy and four failing runs of DMD2 on the digits, and what the run doctor says of them.

    python benchmarks/doctor_runs.py --teacher runs/digits/teacher/pipeline --out docs/images/doctor

Writes ``.png`` (the doctor's signs over the updates of all runs, and samples of each) and
``.json`` (signs, findings and the distance to the teacher at the end). ``docs/training_dmd.md``
shows them.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import argparse
import json
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lit_distill.callbacks import RunDoctor
from lit_distill.datamodules import DigitsDataModule
from lit_distill.diffusion import sample, seeded_noise
from lit_distill.methods import DMD2
from lit_distill.metrics import DigitsExtractor, describe, to_uint8
from lit_distill.metrics.figures import frechet_distance
from lit_distill.models import load_denoiser

RATE = 4e-4
ADAM = partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.01)
HEALTHY: dict[str, Any] = {
    "update_ratio": 2,
    "optimizer": partial(ADAM, lr=RATE),
    "fake_optimizer": partial(ADAM, lr=1e-3),
}
RUNS: dict[str, dict[str, Any]] = {
    "healthy": {},
    "fake score frozen": {"fake_optimizer": partial(ADAM, lr=0.0)},
    "learning rate 20 times as high": {"optimizer": partial(ADAM, lr=20 * RATE)},
    "discriminator too strong": {
        "discriminator_weight": 10.0,
        "fake_optimizer": partial(ADAM, lr=5e-3),
        "noise_range": (0.0, 0.3),
    },
    "the same, and the student gives in to it": {
        "discriminator_weight": 10.0,
        "adversarial_weight": 1.0,
        "fake_optimizer": partial(ADAM, lr=5e-3),
        "noise_range": (0.0, 0.3),
    },
}
SIGNS = ("fake_lag", "unrest", "win_rate", "spread", "outside", "clipped")


class Record(Callback):
    """Keeps what the doctor logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if trainer.global_step % 25 == 0:
            found = {
                name.removeprefix("doctor/"): float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("doctor/")
            }
            self.rows.append({"step": trainer.global_step, **found})


@torch.no_grad()
def images(model: Any, count: int, **how: Any) -> Tensor:
    """uint8 images from the noises of the evaluation's test."""
    noise = seeded_noise((1, 8, 8), range(10_000_000, 10_000_000 + count))
    return to_uint8(sample(model, noise, condition=torch.arange(count) % 10, **how).float())


def main() -> None:
    """Train, look, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--teacher", default="runs/digits/teacher/pipeline")
    parser.add_argument("--out", type=Path, default=Path("doctor"))
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    extractor, count = DigitsExtractor(), 2_000
    labels = torch.arange(count) % 10
    teacher = load_denoiser(options.teacher)
    real = describe(extractor, images(teacher, count, steps=18, solver="heun"), labels)
    report, samples = {}, {}
    for name, planted in RUNS.items():
        seed_everything(0, verbose=False)
        module = DMD2(options.teacher, **{**HEALTHY, **planted}, ema_decay=0.99)
        doctor, record = RunDoctor(), Record()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(
                accelerator="cpu",
                precision="bf16-mixed",
                max_steps=options.updates,
                max_epochs=-1,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                default_root_dir=folder,
                callbacks=[doctor, record],
            ).fit(module, DigitsDataModule(batch_size=options.batch_size))
        made = images(module.network, count, steps=1)
        distance = frechet_distance(real.features, describe(extractor, made, labels).features)
        samples[name] = made[:20]
        report[name] = {
            "fd_teacher_digits": distance,
            "signs": record.rows,
            "findings": [finding._asdict() for finding in doctor.findings],
        }
        print(f"\n{name}: distance to the teacher {distance:.3f}")
        for finding in doctor.findings:
            print(f"  update {finding.step}, {finding.sign}: {finding.advice}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, samples, options.out.with_suffix(".png"))


def draw(report: dict[str, Any], samples: dict[str, Tensor], path: Path) -> None:
    """Signs above, samples below."""
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    for axes, sign in zip(above.subplots(2, 3).flat, SIGNS, strict=True):
        for name, run in report.items():
            rows = [row for row in run["signs"] if sign in row]
            axes.plot([r["step"] for r in rows], [r[sign] for r in rows], label=name)
        axes.set(title=f"doctor/{sign}", xlabel="update")
        if sign == "fake_lag":
            axes.set_yscale("log")
    above.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    for axes, (name, found) in zip(below.subplots(len(samples), 1), samples.items(), strict=True):
        axes.imshow(found[:, 0].permute(1, 0, 2).reshape(8, -1), cmap="gray")
        axes.set_title(f"{name}: {report[name]['fd_teacher_digits']:.2f}", fontsize=9)
        axes.axis("off")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
