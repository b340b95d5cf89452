"""``lit-distill import``: a checkpoint in another format as a folder that every command reads."""

import argparse
from pathlib import Path

from lit_distill.commands.sample import Parser

_KINDS = ("mnist-ddpm",)


def run_import(args: list[str]) -> int:
    """Turn a checkpoint into a folder.

    Args:
        args: The command line after ``import``.

    Returns:
        The exit status, 0.

    Raises:
        argparse.ArgumentError: The command line is wrong.
        FileNotFoundError: There is no such file.
        ValueError: The file holds another network, or something is in the folder's way.
    """
    options = _parser().parse_args(args)
    # Here, as diffusers takes seconds to import.
    from lit_distill.models import read_mnist_ddpm, save_denoiser

    denoiser = read_mnist_ddpm(options.file)
    save_denoiser(denoiser, options.out)
    count = sum(p.numel() for p in denoiser.parameters())
    print(
        f"{options.out}: a network of {count:,} parameters, {denoiser.num_classes} classes, "
        f"{len(denoiser.betas)} noise levels up to {denoiser.sigma_max:.2f}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lit-distill import",
        description="Turn a checkpoint in another format into a folder that teacher: reads.",
    )
    parser.add_argument(
        "kind",
        choices=_KINDS,
        help="mnist-ddpm: the state_dict of the conditional MNIST model (nn_model.* and schedule)",
    )
    parser.add_argument("file", type=Path, help="the checkpoint")
    parser.add_argument(
        "out", type=Path, help="the folder to write, e.g. runs/mnist/teacher_original/pipeline"
    )
    return parser
