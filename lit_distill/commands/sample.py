"""``lit-distill sample``: images from any exported folder, a teacher's or a student's."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil, sqrt
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lit_distill.commands.errors import one_line
from lit_distill.diffusion import (
    SOLVERS,
    Condition,
    Denoiser,
    EvaluationCounter,
    GuidedDenoiser,
    drawn_noise,
    sample,
    seeded_generators,
)

_VISIBLE = 56  # pixels; smaller images are magnified by a whole factor
_TEACHER_STEPS = 18  # 35 evaluations by Heun's method (Karras et al. 2022, CIFAR10)


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that ``main`` reports the errors of all commands in one way."""

    def error(self, message: str) -> NoReturn:
        """Raise an ``ArgumentError``."""
        raise argparse.ArgumentError(None, message)


@dataclass(frozen=True)
class Drawing:
    """Images and what they cost.

    Attributes:
        images: ``(N, C, H, W)`` float32 in [0, 1], on the CPU.
        nfe: Network evaluations for one image, counted (guidance counts two).
        seconds: Time of sampling, without loading.
    """

    images: Tensor
    nfe: int
    seconds: float


@torch.inference_mode()
def draw(
    denoiser: Denoiser,
    seeds: list[int],
    *,
    steps: int,
    solver: str | None = None,
    condition: Condition = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> Drawing:
    """Draw one image for each seed.

    Args:
        denoiser: The model; it is moved to the device.
        seeds: Image i starts from the noise of ``seeds[i]``, however the run is batched.
        steps: Evaluations of a student, jumps of a solver.
        solver: A name in ``lit_distill.diffusion.SOLVERS``; by default a student's own way, and
            Heun's method for a teacher.
        condition: Class labels ``(N,)`` of a conditional model, or named tensors ``(N, ...)``.
        batch_size: Images at a time.
        device: Where to.

    Returns:
        The images, their number of network evaluations and the time.

    Raises:
        ValueError: The model does not say the shape of its images.
    """
    shape = denoiser.image_shape
    if shape is None:
        raise ValueError("The model does not say the shape of its images, so none can be drawn.")
    denoiser = denoiser.to(device).eval()
    rows = torch.arange(len(seeds)).split(batch_size)
    images, begin = [], time.perf_counter()
    with (
        EvaluationCounter(denoiser) as counter,
        tqdm(total=len(seeds), desc="sampling", unit="image", disable=None) as bar,
    ):
        for row in rows:
            generators = seeded_generators(seeds[int(i)] for i in row)
            noise = drawn_noise(shape, generators).to(device)
            x = sample(
                denoiser,
                noise,
                steps=steps,
                solver=solver,
                condition=apply_to_collection(condition, Tensor, _rows, row, device),
                generator=generators,
            )
            x = denoiser.decode(x)
            images.append((x.float() / 2 + 0.5).clamp(0, 1).cpu())
            bar.update(len(row))
    seconds = time.perf_counter() - begin
    return Drawing(torch.cat(images), counter.calls // len(rows), seconds)


def _rows(tensor: Tensor, rows: Tensor, device: str | torch.device) -> Tensor:
    return tensor[rows].to(device)


def run_sample(args: list[str]) -> int:
    """Draw images from an exported folder into a file.

    Args:
        args: The command line after ``sample``.

    Returns:
        The exit status, 0.

    Raises:
        argparse.ArgumentError: The command line is wrong.
        ValueError: An option does not fit the model.
        FileNotFoundError: There is no such folder.
    """
    options = _parser().parse_args(args)
    _check(options)
    from lit_distill.models import load_denoiser  # here, as diffusers takes seconds to import

    with _notes():
        denoiser = load_denoiser(options.folder)
        labels = _labels(options.labels, options.num_images, denoiser)
        prompts = _prompts(options.prompts, options.num_images, denoiser)
        steps = options.steps or _default_steps(denoiser)
        solver = options.solver or ("heun" if denoiser.few_steps is None else None)
        _set_gamma(denoiser, options.gamma)
        drawing = draw(
            _guided(denoiser, options.guidance, prompts),
            list(range(options.seed, options.seed + options.num_images)),
            steps=steps,
            solver=solver,
            condition=labels if prompts is None else prompts,
            batch_size=options.batch_size,
            device=_device(options.device),
        )
    _write(options.out, drawing.images, labels, options.seed)
    count, milliseconds = options.num_images, 1000 * drawing.seconds / options.num_images
    print(
        f"{count} image{'s' * (count > 1)} by {steps} step{'s' * (steps > 1)} "
        f"({solver or 'its own jumps'}), NFE {drawing.nfe}, {drawing.seconds:.2f} s "
        f"({milliseconds:.2f} ms an image): {options.out}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lit-distill sample",
        description="Draw images from an exported folder (a teacher's or a student's).",
    )
    add = parser.add_argument
    add("folder", help="a diffusers folder, e.g. runs/digits/dmd/pipeline, or a hub id")
    add(
        "--out",
        type=Path,
        default=Path("samples.png"),
        metavar="FILE",
        help="a grid (.png) or arrays (.npz: images, seeds, labels) [%(default)s]",
    )
    add("--num-images", type=int, default=64, metavar="N", help="how many [%(default)s]")
    add(
        "--seed", type=int, default=0, metavar="S", help="image i is drawn with S + i [%(default)s]"
    )
    add(
        "--steps",
        type=int,
        metavar="N",
        help=f"jumps [what a student was trained for; {_TEACHER_STEPS} for a teacher]",
    )
    add(
        "--gamma",
        type=float,
        metavar="G",
        help="share of fresh noise between a student's jumps, 0 to 1 [as it was trained]",
    )
    add("--labels", metavar="L", help="classes to cycle through: 0,1,2 or all [all]")
    add("--prompts", nargs="+", metavar="P", help="what a text-to-image model shall show, in turn")
    add(
        "--guidance",
        type=float,
        metavar="G",
        help="scale of classifier-free guidance, 1 = none [1, or as a student was trained]",
    )
    add(
        "--solver",
        choices=list(SOLVERS),
        help="[heun for a teacher, its own jumps for a student]",
    )
    add("--batch-size", type=int, default=256, metavar="N", help="images at a time [%(default)s]")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... [a GPU where there is one]")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse what no model could fulfil, before the model is loaded."""
    if options.out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out {options.out}: the name must end in .png (grid) or .npz (arrays).")
    for name in ("steps", "num_images", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least 1.")
    if options.seed < 0:
        raise ValueError(f"--seed {options.seed}: it must not be negative.")
    if options.gamma is not None and not 0 <= options.gamma <= 1:
        raise ValueError(f"--gamma {options.gamma}: a share of noise lies between 0 and 1.")
    if options.gamma is not None and options.solver is not None:
        raise ValueError(
            f"--gamma {options.gamma} is for a student's own jumps, and --solver {options.solver} "
            "takes their place: give one of them."
        )


@contextmanager
def _notes() -> Iterator[None]:
    """Tell each warning once, as one line without the place in the sources that it came from."""
    told: set[str] = set()

    def tell(message: Warning | str, *place: Any, **more: Any) -> None:
        text = one_line(message) if isinstance(message, Warning) else message
        if text not in told:
            told.add(text)
            tqdm.write(f"lit-distill: note: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = tell
        yield


def _labels(text: str | None, count: int, denoiser: Denoiser) -> Tensor | None:
    """One label for each image, in turn; None for an unconditional model."""
    classes = denoiser.num_classes
    if classes is None:
        if text is not None:
            raise ValueError(f"--labels {text}: this model is unconditional, leave --labels out.")
        return None
    try:
        asked = list(range(classes)) if text in (None, "all") else [int(t) for t in text.split(",")]
    except ValueError:
        raise ValueError(f"--labels {text}: give numbers as in 0,1,2, or all.") from None
    if not all(0 <= label < classes for label in asked):
        raise ValueError(f"--labels {text}: this model has the classes 0 to {classes - 1}.")
    return torch.tensor(asked).repeat(-(-count // len(asked)))[:count]


def _default_steps(denoiser: Denoiser) -> int:
    few = denoiser.few_steps
    return _TEACHER_STEPS if few is None else few.trained[0]


def _set_gamma(denoiser: Denoiser, gamma: float | None) -> None:
    """Let a student add another share of fresh noise between its jumps."""
    if gamma is None:
        return
    if denoiser.few_steps is None:
        raise ValueError(
            f"--gamma {gamma}: this folder holds a teacher, which a solver samples without fresh "
            "noise; leave --gamma out."
        )
    denoiser.few_steps = replace(denoiser.few_steps, gamma=gamma)


def _prompts(asked: list[str] | None, count: int, denoiser: Denoiser) -> dict[str, Tensor] | None:
    """The embedding of one prompt for each image, in turn; None for a model without prompts."""
    codec = denoiser.codec
    if codec is None:
        if asked is not None:
            raise ValueError("--prompts: this model takes no prompts, leave --prompts out.")
        return None
    if asked is None:
        raise ValueError('This is a text-to-image model: say what to draw, --prompts "a cat".')
    rows = torch.arange(count) % len(asked)
    return {name: tensor[rows] for name, tensor in codec.condition(asked).items()}


def _guided(denoiser: Denoiser, scale: float | None, prompts: dict[str, Tensor] | None) -> Denoiser:
    if scale is not None and prompts is not None and "guidance" in denoiser.inputs:
        length = len(prompts["prompt_embeds"])  # a network that is told costs one evaluation
        prompts["guidance"] = torch.full((length,), scale)
        return denoiser
    if scale is None or scale == 1:
        return denoiser
    if prompts is not None:
        return GuidedDenoiser(denoiser, scale)
    if denoiser.num_classes is None:
        raise ValueError(f"--guidance {scale}: this model is unconditional, use 1.")
    denoiser.null(torch.zeros(1, dtype=torch.int64))  # says so if there is no null class
    return GuidedDenoiser(denoiser, scale)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: it cannot be used here ({reason}).") from error
    return device


def _write(out: Path, images: Tensor, labels: Tensor | None, seed: int) -> None:
    """Write the file under a temporary name, then rename it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.stem}-{os.getpid()}{out.suffix}")
    try:
        if out.suffix == ".png":
            _picture(images, labels).save(draft)
        else:
            arrays: dict[str, Any] = {"images": images.permute(0, 2, 3, 1).numpy()}
            arrays["seeds"] = np.arange(seed, seed + len(images))
            if labels is not None:
                arrays["labels"] = labels.numpy()
            np.savez(draft, **arrays)
        os.replace(draft, out)
    finally:
        draft.unlink(missing_ok=True)


def _picture(images: Tensor, labels: Tensor | None) -> Image.Image:
    """A grid with a column for each class, if there are 2 to 20, else a square one."""
    from lit_distill.callbacks.pictures import tile  # here, as lightning takes seconds to import

    count, _, height, width = images.shape
    classes = 0 if labels is None else len(labels.unique())
    columns = min(classes if 2 <= classes <= 20 else ceil(sqrt(count)), count)
    grid = tile((images * 255).round().to(torch.uint8), columns)
    pixels = grid.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    scale = max(1, _VISIBLE // max(height, width))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
