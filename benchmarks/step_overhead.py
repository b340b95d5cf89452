"""What a training step costs beyond its network passes.

    python benchmarks/step_overhead.py --out step_overhead.json

A whole step through Lightning's Trainer, as users run it (pairs, logging, progress bar, gradient
clipping, the average of the weights), is timed against a plain loop of every network pass and
optimizer step that it needs. Both run in turn in one process, in blocks of steps: plain, trainer,
plain. A repeat's ratio is the trainer's block over the mean of the two plain ones; the second plain
block over the first is the null test, which tells how far a ratio can be trusted. Reported are
medians over the repeats. The target is a ratio of at most 1.05.

A step is a batch: of SFD, one update for each of its evaluations. A method is one entry in
``METHODS``; distances are ``l2``, which cost no pass.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lit_distill.callbacks import PairWriter
from lit_distill.datamodules import ImageDataModule, PairsDataModule
from lit_distill.diffusion import Denoiser, EDMDenoiser
from lit_distill.losses import r1_penalty
from lit_distill.methods import (
    DMD,
    DMD2,
    SFD,
    AdversarialDistillation,
    ConsistencyDistillation,
    ConsistencyTraining,
    ConsistencyTrajectory,
    DiffusionTeacher,
    DistillationModule,
    KnowledgeDistillation,
    MeanFlow,
    MultiBoundaryConsistencyDistillation,
    ProgressiveDistillation,
    RectifiedFlow,
    Reflow,
    SiD,
    TrajectoryDistillation,
)
from lit_distill.methods.alternating import untrained
from lit_distill.methods.base import copy_of, network_of
from lit_distill.methods.mean_flow import contiguous_norms, total_derivative
from lit_distill.methods.rectified_flow import as_flow
from lit_distill.models import Discriminator, UNet, add_inputs

Step = Callable[[], None]


class Method(NamedTuple):
    """A method to measure.

    Attributes:
        module: Makes it from a teacher.
        passes: Makes a plain step of the same passes, for a batch size.
        data: What it is trained on.
        updates: Student updates of a batch.
    """

    module: Callable[[Denoiser], DistillationModule]
    passes: Callable[[Denoiser, int], Step]
    data: Literal["images", "pairs", "trajectories"] = "images"
    updates: int = 1


def dmd_passes(teacher: Denoiser, batch_size: int) -> Step:
    """DMD: the student on fresh and stored noise, both scores on its samples, the fake score."""
    student, fake = copy_of(teacher).eval(), copy_of(teacher).eval()
    adams = [torch.optim.AdamW(network.parameters(), lr=5e-5) for network in (student, fake)]
    noise, label = inputs(teacher, 2 * batch_size)
    top, sigma = torch.full((2 * batch_size,), 80.0), torch.full((batch_size,), 1.0)

    def step() -> None:
        samples = student(80.0 * noise, top, label)
        x = samples[:batch_size].detach() + noise[:batch_size]
        with torch.no_grad():
            teacher(x, sigma, label[:batch_size])
            fake(x, sigma, label[:batch_size])
        update(adams[0], samples.square().mean())
        update(adams[1], fake(x, sigma, label[:batch_size]).square().mean())

    return step


def passes(
    teacher: Denoiser,
    batch_size: int,
    asked: int = 0,
    judged: int = 0,
    updates: int = 1,
    told: tuple[str, ...] = (),
) -> Step:
    """What most methods need.

    Args:
        teacher: The teacher.
        batch_size: Of each pass.
        asked: Evaluations of the teacher.
        judged: Passes of the student, or its average, without a graph.
        updates: Passes of the student with a graph, each with a step of its own.
        told: Further conditions of the student.
    """
    student = copy_of(teacher).train()
    add_inputs(network_of(student), told)
    adam = torch.optim.AdamW(student.parameters(), lr=1e-4)
    noise, label = inputs(teacher, batch_size)
    sigma = torch.full((batch_size,), 1.0)
    condition = {"label": label, **dict.fromkeys(told, sigma)}

    def step() -> None:
        with torch.no_grad():
            for _ in range(asked):
                teacher(noise, sigma, label)
            for _ in range(judged):
                student(noise, sigma, condition)
        for _ in range(updates):
            update(adam, student(noise, sigma, condition).square().mean())

    return step


def ctm_passes(teacher: Denoiser, batch_size: int) -> Step:
    """CTM: a jump from either point, both carried on by the frozen average, and denoising."""
    student = copy_of(teacher).train()
    add_inputs(network_of(student), ("to_sigma",))
    average = copy_of(student).requires_grad_(False).eval()
    adam = torch.optim.AdamW(student.parameters(), lr=1e-4)
    noise, label = inputs(teacher, batch_size)
    sigma = torch.full((batch_size,), 1.0)
    condition = {"label": label, "to_sigma": sigma}

    def step() -> None:
        ahead = student(noise, sigma, condition)
        with torch.no_grad():
            teacher(noise, sigma, label)
            teacher(noise, sigma, label)
            average(student(noise, sigma, condition), sigma, condition)
        end = average(ahead, sigma, condition)  # the gradient goes through it
        update(adam, end.square().mean() + student(noise, sigma, label).square().mean())

    return step


def dmd2_passes(teacher: Denoiser, batch_size: int, ratio: int = 2) -> Step:
    """DMD2: the student, both scores and the heads on its samples; fake score and heads on more."""
    student, fake = copy_of(teacher).eval(), copy_of(teacher).eval()
    heads = Discriminator(fake)
    judges = nn.ModuleList([fake, heads])
    adams = [torch.optim.AdamW(module.parameters(), lr=5e-5) for module in (student, judges)]
    noise, label = inputs(teacher, batch_size)
    top, sigma = torch.full((batch_size,), 80.0), torch.full((batch_size,), 1.0)

    def step() -> None:
        x = student(80.0 * noise, top, label)
        with torch.no_grad():
            teacher(x, sigma, label)
            fake(x, sigma, label)
        with untrained(judges):
            logits = heads(heads.features(fake, x + noise, sigma, label))
        update(adams[0], x.square().mean() + logits.mean())
        for i in range(ratio):
            with torch.no_grad():
                x = x.detach() if i == 0 else student(80.0 * noise, top, label)
            denoised, made = heads.look(fake, x + noise, sigma, label)
            real = heads.features(fake, noise, sigma, label)
            update(adams[1], denoised.square().mean() + heads(made).mean() - heads(real).mean())

    return step


def sid_passes(teacher: Denoiser, batch_size: int) -> Step:
    """SiD: the student and both scores with one graph; the fake score."""
    student, fake = copy_of(teacher).eval(), copy_of(teacher).eval()
    adams = [torch.optim.AdamW(module.parameters(), lr=5e-5) for module in (student, fake)]
    noise, label = inputs(teacher, batch_size)
    top, sigma = torch.full((batch_size,), 2.5), torch.full((batch_size,), 1.0)

    def step() -> None:
        x = student(2.5 * noise, top, label)
        with untrained(fake):
            both = teacher(x + noise, sigma, label) - fake(x + noise, sigma, label)
        update(adams[0], both.square().mean())
        update(adams[1], fake(x.detach() + noise, sigma, label).square().mean())

    return step


def adversarial_passes(teacher: Denoiser, batch_size: int) -> Step:
    """LADD: the student through the teacher's features and the heads; features of both kinds."""
    student, heads = copy_of(teacher).eval(), Discriminator(teacher)
    adams = [torch.optim.AdamW(module.parameters(), lr=5e-5) for module in (student, heads)]
    noise, label = inputs(teacher, batch_size)
    top, sigma = torch.full((batch_size,), 80.0), torch.full((batch_size,), 1.0)

    def step() -> None:
        x = student(80.0 * noise, top, label)
        with untrained(heads):
            logits = heads(heads.features(teacher, x + noise, sigma, label))
        update(adams[0], logits.mean())
        with torch.no_grad():
            made = heads.features(teacher, x + noise, sigma, label)
            real = heads.features(teacher, noise, sigma, label)
        penalty = r1_penalty(heads, real).mean()
        update(adams[1], heads(made).mean() - heads(real).mean() + penalty)

    return step


def mean_flow_passes(teacher: Denoiser, batch_size: int) -> Step:
    """MeanFlow: the teacher, the derivative on half of the batch, the student."""
    student = as_flow(network_of(copy_of(teacher))).train()
    add_inputs(student, ("to_sigma",))
    adam = torch.optim.AdamW(student.parameters(), lr=1e-4)
    noise, label = inputs(teacher, batch_size)
    t, half = torch.full((batch_size,), 0.5), batch_size // 2

    def step() -> None:
        with torch.no_grad():
            teacher(noise, t, label)
            student.eval()
            with contiguous_norms(student):
                total_derivative(
                    lambda x, t, end: student.velocity(x, t, label[half:], end),
                    noise[half:],
                    noise[half:],
                    t[half:],
                    t[half:],
                    "jvp",
                )
            student.train()
        update(adam, student.velocity(noise, t, label, t / 2).square().mean())

    return step


def sfd(**options: Any) -> Callable[[Denoiser], DistillationModule]:
    """SFD of four evaluations, beside eight of the teacher."""
    return partial(SFD, **{"distance": "l2", "teacher_substeps": 2, "steps": 4, **options})


# As published: 2 evaluations after an analytical first step, beside 12 of the teacher.
SFD_PUBLISHED = {"steps": 2, "teacher_substeps": 4, "analytical_first_step": True}
SFD_V = {"steps": [4, 4]}  # two numbers, as many updates in each batch
HEUN = {"distance": "l2", "teacher_solver": "heun"}

METHODS = {
    "teacher": Method(lambda teacher: DiffusionTeacher(copy_of(teacher)), passes),
    "kd": Method(partial(KnowledgeDistillation, distance="l2"), passes, "pairs"),
    "kd_online": Method(
        partial(KnowledgeDistillation, distance="l2", online=True, teacher_steps=3),
        partial(passes, asked=5),  # Heun's last step, to 0, is Euler's
    ),
    "pd": Method(partial(ProgressiveDistillation, teacher_steps=8), partial(passes, asked=2)),
    "td": Method(
        partial(TrajectoryDistillation, teacher_substeps=3, **HEUN), partial(passes, asked=6)
    ),
    "sfd": Method(sfd(), partial(passes, asked=8, updates=4), updates=4),
    "sfd_v": Method(sfd(**SFD_V), partial(passes, asked=8, updates=4, told=("steps",)), updates=4),
    "sfd_stored": Method(sfd(), partial(passes, updates=4), "trajectories", updates=4),
    "sfd_published": Method(sfd(**SFD_PUBLISHED), partial(passes, asked=12, updates=2), updates=2),
    "sfd_published_stored": Method(
        sfd(**SFD_PUBLISHED), partial(passes, updates=2), "trajectories", updates=2
    ),
    "cd": Method(partial(ConsistencyDistillation, **HEUN), partial(passes, asked=2, judged=1)),
    "cd_ema": Method(
        partial(ConsistencyDistillation, target="ema", **HEUN), partial(passes, asked=2, judged=1)
    ),
    "ct": Method(partial(ConsistencyTraining, distance="l2"), partial(passes, judged=1)),
    "multi_boundary": Method(
        partial(MultiBoundaryConsistencyDistillation, **HEUN), partial(passes, asked=2, judged=1)
    ),
    "ctm": Method(partial(ConsistencyTrajectory, max_teacher_steps=1, **HEUN), ctm_passes),
    "rectified_flow": Method(
        lambda teacher: RectifiedFlow(as_flow(network_of(copy_of(teacher)))), passes
    ),
    "reflow": Method(Reflow, passes, "pairs"),
    "mean_flow": Method(MeanFlow, mean_flow_passes),
    "dmd": Method(partial(DMD, distance="l2"), dmd_passes, "pairs"),
    "dmd2": Method(partial(DMD2, update_ratio=2), dmd2_passes),
    "sid": Method(SiD, sid_passes),
    "adversarial": Method(AdversarialDistillation, adversarial_passes),
}


def inputs(teacher: Denoiser, count: int) -> tuple[Tensor, Tensor]:
    """Noise and labels."""
    return torch.randn(count, *(teacher.image_shape or ())), torch.arange(count) % 10


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A backward pass and an optimizer step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Images(ImageDataModule):
    """Random images of MNIST's shape."""

    name, num_classes = "random", 10
    image_shape = (1, 28, 28)

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        count = 20 * self.batch_size
        images = torch.randint(0, 256, (count, *self.image_shape), dtype=torch.uint8)
        return images, torch.arange(count) % 10


class Stopwatch(Callback):
    """Times blocks of the trainer's steps, and of plain steps between them."""

    def __init__(self, plain: Step, steps: int, warm_up: int) -> None:
        self.plain, self.steps, self.warm_up, self.batches = plain, steps, warm_up, 0
        self.whole: list[float] = []
        self.before: list[float] = []
        self.after: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self.batches += 1
        done = self.batches - self.warm_up
        if done < 0 or done % self.steps:
            return
        if done == 0:
            self._block(self.warm_up)
        else:
            self.whole.append((time.perf_counter() - self._began) / self.steps)
            self.after.append(self._block(self.steps))
        self.before.append(self._block(self.steps))
        self._began = time.perf_counter()

    def _block(self, steps: int) -> float:
        """Seconds of a plain step."""
        began = time.perf_counter()
        for _ in range(steps):
            self.plain()
        return (time.perf_counter() - began) / steps


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one method; seconds are those of one step."""
    torch.manual_seed(0)
    network = UNet(28, 1, 10, options.widths, options.layers, norm_num_groups=8)
    teacher = EDMDenoiser(network).requires_grad_(False).eval()
    bf16 = options.precision == "bf16-mixed"
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    method = METHODS[name]
    plain = method.passes(teacher, options.batch_size)

    def plain_step() -> None:
        with context:
            plain()

    watch = Stopwatch(plain_step, options.steps, options.warm_up)
    with tempfile.TemporaryDirectory() as folder:
        data = made_data(method, teacher, options.batch_size, folder)
        batches = options.warm_up + options.repeats * options.steps
        trainer = Trainer(
            accelerator="cpu",
            precision=options.precision,
            max_epochs=-1,
            max_steps=batches * method.updates,
            limit_val_batches=0,
            logger=TensorBoardLogger(folder),
            default_root_dir=folder,
            callbacks=[watch],
            enable_checkpointing=False,  # by default one at the end of each epoch, short here
        )
        trainer.fit(method.module(teacher), data)
    blocks = list(zip(watch.whole, watch.before, watch.after, strict=False))
    return {
        "method": name,
        "whole_step_s": statistics.median(watch.whole),
        "passes_s": statistics.median((a + b) / 2 for _, a, b in blocks),
        "ratio": statistics.median(2 * whole / (a + b) for whole, a, b in blocks),
        "null_ratio": statistics.median(b / a for _, a, b in blocks),
        "ratios": [2 * whole / (a + b) for whole, a, b in blocks],
        "null_ratios": [b / a for _, a, b in blocks],
        "network_parameters": sum(p.numel() for p in teacher.parameters()),
    }


def made_data(method: Method, teacher: Denoiser, batch_size: int, folder: str) -> ImageDataModule:
    """Images, or pairs of one Euler step, or a method's own trajectories."""
    data = Images(batch_size, predict_samples=20 * batch_size, predict_batch_size=batch_size)
    if method.data == "images":
        return data
    writer = PairWriter(f"{folder}/pairs")
    quiet = {"logger": False, "enable_progress_bar": False}
    one_step = DiffusionTeacher(teacher, steps=1, solver="euler")
    sampler = method.module(teacher) if method.data == "trajectories" else one_step
    Trainer(accelerator="cpu", callbacks=[writer], **quiet).predict(sampler, data)
    return PairsDataModule(data, f"{folder}/pairs", batch_size=batch_size)


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--layers", type=int, default=1, help="residual blocks a level")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="steps a block")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "Attribute '.*|.*does not have many workers|Found .* module")
    results = [measure(name, options) for name in options.methods]
    print(f"\n{'method':<22}{'whole step':>12}{'its passes':>12}{'ratio':>8}{'null':>8}")
    for row in results:
        print(
            f"{row['method']:<22}{1e3 * row['whole_step_s']:>9.1f} ms{1e3 * row['passes_s']:>9.1f} "
            f"ms{row['ratio']:>8.3f}{row['null_ratio']:>8.3f}"
        )
    if options.out is not None:
        settings = {k: v for k, v in vars(options).items() if k != "out"}
        machine = {"processor": platform.processor(), "torch": torch.__version__}
        report = {"settings": settings, "machine": machine, "results": results}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
