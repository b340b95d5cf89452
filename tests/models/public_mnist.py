"""Checkpoints in the format of the public MNIST diffusion models, with random numbers."""

import torch
from torch import Tensor


def schedule(steps: int = 400) -> dict[str, Tensor]:
    """The seven buffers, as those models compute them (float32)."""
    beta = (0.02 - 1e-4) * torch.arange(0, steps + 1, dtype=torch.float32) / steps + 1e-4
    alpha = 1 - beta
    kept = torch.cumsum(torch.log(alpha), dim=0).exp()
    return {
        "alpha_t": alpha,
        "oneover_sqrta": 1 / torch.sqrt(alpha),
        "sqrt_beta_t": torch.sqrt(beta),
        "alphabar_t": kept,
        "sqrtab": torch.sqrt(kept),
        "sqrtmab": torch.sqrt(1 - kept),
        "mab_over_sqrtmab": (1 - alpha) / torch.sqrt(1 - kept),
    }


def public_checkpoint(
    width: int, classes: int = 10, steps: int = 400, device: str = "cpu"
) -> dict[str, Tensor]:
    """All tensors by the documented names."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int, scale: float = 1.0) -> None:
        state[f"nn_model.{name}"] = scale * torch.randn(shape, device=device)

    def weights(name: str, shape: tuple[int, ...], outputs: int) -> None:
        fan = torch.Size(shape).numel() / outputs
        add(f"{name}.weight", *shape, scale=1.4 * fan**-0.5)
        add(f"{name}.bias", outputs, scale=0.1)

    def norm(name: str, count: int, batch: bool = False) -> None:
        state[f"nn_model.{name}.weight"] = 1 + 0.2 * torch.randn(count, device=device)
        add(f"{name}.bias", count, scale=0.2)
        if batch:
            add(f"{name}.running_mean", count, scale=0.2)
            state[f"nn_model.{name}.running_var"] = 0.5 + torch.rand(count, device=device)
            state[f"nn_model.{name}.num_batches_tracked"] = torch.tensor(9, device=device)

    def rcb(name: str, inputs: int, outputs: int) -> None:
        for part, before in (("conv1", inputs), ("conv2", outputs)):
            weights(f"{name}.{part}.0", (outputs, before, 3, 3), outputs)
            norm(f"{name}.{part}.1", outputs, batch=True)

    def embedding(name: str, inputs: int, outputs: int) -> None:
        weights(f"{name}.model.0", (outputs, inputs), outputs)
        weights(f"{name}.model.2", (outputs, outputs), outputs)

    rcb("init_conv", 1, width)
    rcb("down1.model.0", width, width)
    rcb("down2.model.0", width, 2 * width)
    embedding("timeembed1", 1, 2 * width)
    embedding("timeembed2", 1, width)
    embedding("contextembed1", classes, 2 * width)
    embedding("contextembed2", classes, width)
    weights("up0.0", (2 * width, 2 * width, 7, 7), 2 * width)
    norm("up0.1", 2 * width)
    for name, inputs in (("up1", 4 * width), ("up2", 2 * width)):
        weights(f"{name}.model.0", (inputs, width, 2, 2), width)
        rcb(f"{name}.model.1", width, width)
        rcb(f"{name}.model.2", width, width)
    weights("out.0", (width, 2 * width, 3, 3), width)
    norm("out.1", width)
    weights("out.3", (1, width, 3, 3), 1)
    return state | {name: tensor.to(device) for name, tensor in schedule(steps).items()}
