"""Public checkpoints of a conditional MNIST diffusion model, as a denoiser."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_distill.diffusion import EpsilonDenoiser
from lit_distill.models.mnist_unet import MNISTUNet
from lit_distill.models.networks import UNet

_PREFIX = "nn_model."
_BLACK_AND_WHITE = (0.0, 1.0)  # of the images that these networks were trained on


def read_mnist_ddpm(file: str | Path) -> EpsilonDenoiser:
    """Read a ``state_dict`` of 128 tensors named ``nn_model.*`` and 7 schedule buffers.

    Args:
        file: A file of ``torch.save``; it is read without running code from it.

    Returns:
        The denoiser, in eval mode, class-conditional with a null class. Its width, its classes
        and its schedule follow from the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything else.
    """
    state = _read(Path(file))
    betas = _betas(state, file)
    weights = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
    network = _network(weights, len(betas) - 1, file)
    # The network was trained at t = 1..T of a table that begins at 0: times 0 and 1 are one step.
    first = 1 - (1 - betas[:1]) * (1 - betas[1:2])
    denoiser = EpsilonDenoiser(
        UNet.wrap(network, null_label=network.num_classes, num_classes=network.num_classes),
        betas=torch.cat([first, betas[2:]]),
        image_range=_BLACK_AND_WHITE,
    )
    return denoiser.eval()


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}: give a checkpoint's state_dict.")
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} is no file of tensors that torch.save wrote, or more than that "
            f"({type(error).__name__}): save the model's state_dict() alone."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file} holds no state_dict: save the model's state_dict() alone.")
    return state


def _betas(state: dict[str, Tensor], file: str | Path) -> Tensor:
    """The schedule ``(T + 1,)`` in float64, once its seven buffers agree."""
    if "sqrt_beta_t" not in state or state["sqrt_beta_t"].ndim != 1:
        raise _another(file, "it has no schedule sqrt_beta_t (T + 1,)")
    betas = state["sqrt_beta_t"].double() ** 2
    alpha = 1 - betas
    kept = alpha.cumprod(0)
    expected = {
        "alpha_t": alpha,
        "oneover_sqrta": alpha.rsqrt(),
        "sqrt_beta_t": betas.sqrt(),
        "alphabar_t": kept,
        "sqrtab": kept.sqrt(),
        "sqrtmab": (1 - kept).sqrt(),
        "mab_over_sqrtmab": betas / (1 - kept).sqrt(),
    }
    for name, values in expected.items():
        found = state.get(name)
        if found is None or found.shape != values.shape:
            raise _another(file, f"its schedule lacks {name} {tuple(values.shape)}")
        if not torch.allclose(found.double(), values, rtol=1e-2, atol=1e-4):
            raise ValueError(f"The schedule in {file} contradicts itself: {name} and sqrt_beta_t.")
    if len(betas) < 3 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"The schedule in {file} is none: its betas lie between 0 and 1.")
    return betas


def _network(weights: dict[str, Tensor], num_timesteps: int, file: str | Path) -> MNISTUNet:
    """The network that fits these weights, with them."""
    widest, context = (
        weights.get("init_conv.conv1.0.weight"),
        weights.get("contextembed1.model.0.weight"),
    )
    if widest is None or context is None or widest.ndim != 4 or context.ndim != 2:
        raise _another(file, f"it has no {_PREFIX}init_conv and {_PREFIX}contextembed1")
    if len(widest) % 8 or widest.shape[1] != 1:
        raise _another(file, f"its first layer is of shape {tuple(widest.shape)}")
    network = MNISTUNet(
        n_feat=len(widest), num_class_embeds=context.shape[1] + 1, num_timesteps=num_timesteps
    )
    for name, tensor in network.state_dict().items():
        found = weights.get(name)
        if found is None or found.shape != tensor.shape:
            what = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise _another(file, f"{_PREFIX}{name} {tuple(tensor.shape)} is {what}")
    unknown = sorted(weights.keys() - network.state_dict().keys())
    if unknown:
        raise _another(file, f"it also has {', '.join(_PREFIX + name for name in unknown[:3])}")
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise ValueError(f"The weights in {file} hold NaN or infinite values.")
    network.load_state_dict(weights)
    return network


def _another(file: str | Path, reason: str) -> ValueError:
    return ValueError(
        f"{file} is a checkpoint of another network than the conditional MNIST U-Net: {reason}."
    )
