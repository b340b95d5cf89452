"""How fast batches come, and how long a training step waits for them.

    LIT_DISTILL_DATA=FOLDER python benchmarks/loader.py speed --out loader_speed.json
    LIT_DISTILL_DATA=FOLDER python benchmarks/loader.py wait --config configs/mnist/teacher.yaml

``speed``: training batches of CIFAR10's zip file (float32 in [-1, 1], shuffled, mirrored as twice
the data) from a cache that is made anew, and from memory, by the number of threads that make them
ahead. Images a second are the median of several epochs; the first, which may read the cache from
the disk, stands apart. Beside them stand the images for each second of CPU time, which other work
on the machine changes less. The target is 20,000 images/s from the cache with 2 workers.

``wait``: a run as its config says, but for its callbacks and its validation. Lightning's profiler
tells how long each step waits for its batch; the share is that of the time from one wait to the
next. Options that are not known here go to ``lit-distill fit``. The target is 3%.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import SimpleProfiler

from lit_distill.commands.training import DistillationCLI
from lit_distill.datamodules import CIFAR10DataModule, ImageDataModule

WAIT = "[_TrainingEpochLoop].train_dataloader_next"


def epoch(data: ImageDataModule) -> tuple[float, float]:
    """Images a second, and for each second of CPU time."""
    loader = data.train_dataloader()
    began, cpu = time.perf_counter(), time.process_time()
    images = sum(len(batch["image"]) for batch in loader)
    return images / (time.perf_counter() - began), images / (time.process_time() - cpu)


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Images a second from the cache and from memory."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        made = CIFAR10DataModule(cache=folder)
        images, labels = made.images("train")
        print(f"The cache was made in {time.perf_counter() - began:.1f} s.")
        for source in ("cache", "memory"):
            for workers in options.workers:
                data = CIFAR10DataModule(
                    cache=folder, batch_size=options.batch_size, flip=True, workers=workers
                )
                if source == "memory":
                    data._images["train"] = images.clone(), labels
                data.setup("fit")
                first, *later = [epoch(data) for _ in range(1 + options.epochs)]
                row = {
                    "source": source,
                    "workers": workers,
                    "images_per_s": statistics.median(wall for wall, _ in later),
                    "slowest": min(wall for wall, _ in later),
                    "first": first[0],
                    "images_per_cpu_s": statistics.median(cpu for _, cpu in later),
                }
                rows.append(row)
                print(
                    f"{source:<8}{workers} workers {row['images_per_s']:>10,.0f} images/s (slowest "
                    f"epoch {row['slowest']:,.0f}, first {row['first']:,.0f}), "
                    f"{row['images_per_cpu_s']:,.0f} a second of CPU time",
                    flush=True,
                )
    return {"rows": rows}


class StepClock(SimpleProfiler):
    """Notes when a step began to wait for its batch, beside how long it did."""

    def __init__(self) -> None:
        super().__init__()
        self.began: list[float] = []

    def start(self, action_name: str) -> None:
        if action_name == WAIT:
            self.began.append(time.perf_counter())
        super().start(action_name)

    def summary(self) -> str:
        """Nothing: the shares are printed instead."""
        return ""


def wait(options: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """The share of a step's time that it waits for its batch."""
    clock = StepClock()

    class Timed(DistillationCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Any:
            self._get(self.config_init, "trainer").callbacks = []
            return super().instantiate_trainer(**kwargs, profiler=clock)

    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]
        steps = [f"--trainer.max_steps={options.warm_up + options.steps + 1}"]
        root = f"--trainer.default_root_dir={folder}"
        Timed(["fit", "--config", options.config, root, *quiet, *steps, *more])
    waited = clock.recorded_durations[WAIT]
    whole = [b - a for a, b in zip(clock.began, clock.began[1:], strict=False)]
    pairs = list(zip(waited, whole, strict=False))[options.warm_up :]
    shares = [part / step for part, step in pairs]
    report = {
        "config": options.config,
        "steps": len(pairs),
        "step_s": statistics.median(step for _, step in pairs),
        "wait_s": statistics.median(part for part, _ in pairs),
        "share": sum(part for part, _ in pairs) / sum(step for _, step in pairs),
        "largest_share": max(shares),
    }
    print(
        f"{report['steps']} steps of {1e3 * report['step_s']:.1f} ms wait "
        f"{1e3 * report['wait_s']:.3f} ms for data: {report['share']:.2%} of the time, at most "
        f"{report['largest_share']:.2%} of a step."
    )
    return report


def main() -> None:
    """Measure, print, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["speed", "wait"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--config", default="configs/mnist/teacher.yaml")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options, more = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    result = speed(options) if options.what == "speed" else wait(options, more)
    if options.out is not None:
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        machine = {"processor": platform.processor(), "torch": torch.__version__}
        report = {"settings": settings, "machine": machine, **result}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
