"""The contract that every model is seen through.

A denoiser takes ``x = x0 + sigma * noise`` and returns its estimate of ``x0``. Whatever a network
predicts, and however it wants its input scaled and its time named, is settled here and nowhere
else; solvers, losses and methods see denoisers only.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_distill.diffusion.noise_levels import karras_sigmas, rho_levels, wide

Condition = Tensor | dict[str, Tensor] | None
"""Labels ``(B,)``, or named tensors (``label``, ``prompt_embeds``, ``to_sigma``, ...), or None."""


class Network(Protocol):
    """What a denoiser asks of its network: ``network(x, time, condition) -> prediction``."""

    def __call__(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Evaluate at ``x`` (B, *shape) and ``time`` (B,); the result has the shape of ``x``."""
        ...


class Codec(Protocol):
    """The frozen parts of a latent model, see :class:`lit_distill.models.LatentCodec`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) in about [-1, 1] of latents (B, c, h, w)."""
        ...

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """The same, with a gradient to the latents."""
        ...

    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What a denoiser is asked with for prompts."""
        ...

    def null(self, prompt_embeds: Tensor) -> Tensor:
        """The empty prompt's embedding, in the shape of ``prompt_embeds`` (B, L, D)."""
        ...


def like(level: Tensor, x: Tensor) -> Tensor:
    """View per-sample numbers ``(B,)`` so that they broadcast against ``x`` ``(B, *shape)``."""
    return level.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def labels_of(condition: Condition) -> Tensor | None:
    """The class labels in a condition, or None if it has none."""
    return condition.get("label") if isinstance(condition, dict) else condition


def told(denoiser: "Denoiser", condition: Condition, **values: Tensor) -> Condition:
    """Add to a condition those of the values ``(B,)`` that the denoiser's network takes.

    Args:
        denoiser: The model that will be asked.
        condition: Labels or named tensors.
        values: ``to_sigma`` (the level a jump goes to), ``steps`` (of the run), ``step`` (the
            one that a sample is of, from 0), ``guidance``.
    """
    wanted = {name: value for name, value in values.items() if name in denoiser.inputs}
    if not wanted:
        return condition
    known = condition if isinstance(condition, dict) else {"label": condition}
    return {**{k: v for k, v in known.items() if v is not None}, **wanted}


def of_rows(condition: Condition, rows: Tensor) -> Condition:
    """The condition of some samples of a batch, by their indices ``(N,)``, which may repeat."""
    if isinstance(condition, dict):
        return {name: value[rows] for name, value in condition.items()}
    return None if condition is None else condition[rows]


@dataclass(frozen=True)
class FewSteps:
    """How a student is sampled: by jumps between the levels that it was trained for.

    Attributes:
        trained: Numbers of steps (evaluations) that it was trained for; the first is the default.
        grids: Descending levels to jump between, one grid for each number of steps. A number
            without one takes the denoiser's own, :meth:`Denoiser.sigmas`.
        only: Refuse all numbers of steps that were not trained.
        gamma: Share of fresh noise between the jumps (Kim et al. 2024, Algorithm 3): 0 none, 1
            all, as consistency models do.
        analytical_first_step: The first jump costs no evaluation, see
            :func:`lit_distill.diffusion.solve`; a grid has one jump more than it has steps.

    Raises:
        ValueError: If these are no numbers of steps, no levels or no share.
    """

    trained: Sequence[int]
    grids: Sequence[Sequence[float]] = ()
    only: bool = False
    gamma: float = 0.0
    analytical_first_step: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "trained", tuple(self.trained))
        object.__setattr__(self, "grids", tuple(tuple(grid) for grid in self.grids))
        if not self.trained or min(self.trained) < 1:
            raise ValueError(
                f"trained={list(self.trained)} are no numbers of steps: name at least one, each "
                "of at least 1."
            )
        for grid in self.grids:
            falls = all(after < before for before, after in pairwise(grid))
            if len(grid) < 2 or not falls or grid[-1] < 0:
                raise ValueError(
                    f"{list(grid)} is no grid of a student: its levels descend, from the first to "
                    "the last, which may be 0."
                )
        if not 0 <= self.gamma <= 1:
            raise ValueError(
                f"gamma={self.gamma} is no share of fresh noise: it lies between 0 and 1."
            )

    def grid(self, steps: int) -> Tensor | None:
        """The levels of a number of steps, float64, or None where the denoiser's own are meant.

        Raises:
            ValueError: If the student refuses this number.
        """
        if steps not in self.trained:
            known = ", ".join(map(str, self.trained))
            if self.only:
                raise ValueError(
                    f"steps={steps}: this student jumps between the levels it was trained for, "
                    f"and samples in {known} step(s) only."
                )
            # The default filter shows it once, however many batches are sampled.
            warnings.warn(
                f"This student was trained for {known} step(s), not for {steps}.", stacklevel=4
            )
        length = steps + 1 + self.analytical_first_step
        found = next((grid for grid in self.grids if len(grid) == length), None)
        return None if found is None else torch.tensor(found, dtype=torch.float64)


class Denoiser(nn.Module):
    """Estimates ``x0`` from ``x = x0 + sigma * noise``.

    Attributes:
        sigma_min: Smallest noise level that the model knows.
        sigma_max: Largest; sampling starts there.
        image_shape: Shape of one sample, or None where any will do.
        num_classes: Number of classes of a conditional model, or None.
        null_label: The label that stands for "no label", or None.
        few_steps: How a student is sampled; None for a teacher, whose solver and steps are free.
        inputs: Further conditions that the network takes, see :func:`told`.
        floor: Noise level that is left in its estimate of ``x0``.
        original: Fingerprint of the model that this one was before its weights were rounded or
            prepared for adapters; None where they were not.
        codec: What turns prompts into conditions and a latent model's samples into images; None
            for a model of images.
    """

    sigma_min: float
    sigma_max: float
    image_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    null_label: int | None = None
    few_steps: FewSteps | None = None
    inputs: tuple[str, ...] = ()
    floor: float = 0.0
    original: str | None = None
    codec: Codec | None = None

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise.

        Args:
            x: ``(B, *shape)``, noisy samples.
            sigma: ``(B,)``, their noise levels.
            condition: Labels ``(B,)`` or named tensors.

        Returns:
            ``(B, *shape)``, the estimate of ``x0``, in the dtype of ``x``.
        """
        raise NotImplementedError

    def start(self, noise: Tensor) -> Tensor:
        """First state of a sampling run, at ``sigma_max``, from unit noise ``(B, *shape)``."""
        return self.sigma_max * noise

    def sigmas(self, steps: int) -> Tensor:
        """The model's own grid: ``(steps + 1,)`` descending levels that end at 0, float64."""
        return karras_sigmas(steps, self.sigma_min, self.sigma_max)

    def grid(self, steps: int) -> Tensor:
        """The levels of a sampling run: those of the student's training, else its own.

        Raises:
            ValueError: If the student was not trained for this number of steps and refuses it.
        """
        if self.few_steps is None:
            return self.sigmas(steps)
        grid = self.few_steps.grid(steps)
        free = int(self.few_steps.analytical_first_step)  # a jump that is no step
        return self.sigmas(steps + free) if grid is None else grid

    def signal_scale(self, sigma: Tensor) -> Tensor:
        """Factor of the coordinate ``scale * x``, at time ``scale * sigma``, to step in.

        Euler's steps are the same in any. Those of order 2 are not, and a flow that starts at
        ``sigma = 1e6`` needs its own: 18 steps of Heun's method in this one end 15 too far.
        """
        return torch.ones_like(sigma)

    def schedule(self, u: Tensor) -> Tensor:
        """Map ``u`` in [0, 1] to noise levels, uniformly in the model's own notion of time."""
        return rho_levels(u, self.sigma_min, self.sigma_max)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Weight of ``|D - x0|^2`` at ``sigma`` that makes it the network's own squared error."""
        return 1 / wide(sigma) ** 2

    def null(self, condition: Condition) -> Condition:
        """The unconditional counterpart of a condition.

        Raises:
            ValueError: If the model was not trained with a null class.
        """
        if isinstance(condition, dict) and "prompt_embeds" in condition and self.codec is not None:
            return {**condition, "prompt_embeds": self.codec.null(condition["prompt_embeds"])}
        labels = labels_of(condition)
        if labels is None:
            return condition
        if self.null_label is None:
            raise ValueError(
                "This model has no null class, so it cannot be guided: use guidance 1, or train "
                "the teacher with label_dropout > 0."
            )
        null = torch.full_like(labels, self.null_label)
        return {**condition, "label": null} if isinstance(condition, dict) else null

    def some_condition(self, count: int, device: torch.device) -> Condition:
        """A condition for ``count`` samples where it does not matter which."""
        if self.codec is not None:
            prompts = self.codec.condition([""] * count)
            return {name: tensor.to(device) for name, tensor in prompts.items()}
        if self.num_classes is None:
            return None
        return torch.zeros(count, dtype=torch.long, device=device)

    def decode(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in about [-1, 1] of samples: latents by the VAE, else ``x``."""
        return x if self.codec is None else self.codec.decode(x)

    def start_from(self, sigma: float) -> None:
        """Let sampling start at a lower noise level than the teacher's largest.

        Raises:
            ValueError: If the level is outside the range that the network knows.
        """
        if not self.sigma_min < sigma <= self.sigma_max:
            raise ValueError(
                f"generator_sigma={sigma} is outside the teacher's noise levels "
                f"({self.sigma_min:g} to {self.sigma_max:g})."
            )
        self.sigma_max = sigma

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers, JSON-ready; with the network they rebuild the denoiser."""
        return {}

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the class, its settings and all weights."""
        digest = hashlib.sha256(type(self).__name__.encode())
        digest.update(json.dumps(self.settings(), sort_keys=True).encode())
        if self.few_steps is not None:
            digest.update(json.dumps(asdict(self.few_steps), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


class NetworkDenoiser(Denoiser):
    """A denoiser around a network; subclasses say what the network predicts.

    Args:
        network: Called as ``network(x, time, condition)``. Its attributes ``image_shape``,
            ``num_classes`` and ``null_label`` are taken over where it has them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.image_shape = getattr(network, "image_shape", None)
        self.num_classes = getattr(network, "num_classes", None)
        self.null_label = getattr(network, "null_label", None)

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Further conditions that the network takes."""
        return tuple(getattr(self.network, "inputs", ()))

    @property
    def codec(self) -> Codec | None:  # type: ignore[override]
        """What belongs to the network, where it is one of latents."""
        return getattr(self.network, "codec", None)

    def time(self, sigma: Tensor) -> Tensor:
        """The network's time at ``sigma`` (B,)."""
        raise NotImplementedError

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Evaluate the network at ``sigma``.

        A second level is given to the network as a time; left out, it is the first one, as for a
        jump of no length.
        """
        if "to_sigma" in self.inputs:
            given = condition.get("to_sigma", sigma) if isinstance(condition, dict) else sigma
            to_time = self.time(given.clamp_min(self.sigma_min))
            condition = told(self, condition, to_sigma=to_time)
        return self.ask(x, self.time(sigma), condition)

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Evaluate the network in its own precision; the result comes back in that of ``x``.

        Args:
            x: ``(B, *shape)``, scaled as the network wants it.
            time: ``(B,)``, its own time; ``to_sigma`` in the condition is one too.
            condition: Labels or named tensors.
        """
        weight = next(self.network.parameters(), None)
        # Under autocast the weights stay float32, and so does the state between the passes.
        dtype = x.dtype if weight is None else weight.dtype
        # Never in bfloat16, which cannot tell neighbouring times apart.
        precision = torch.promote_types(dtype, torch.float32)
        if isinstance(condition, dict) and "to_sigma" in condition:
            condition = {**condition, "to_sigma": condition["to_sigma"].to(precision)}
        return self.network(x.to(dtype), time.to(precision), condition).to(x.dtype)


class GuidedDenoiser(Denoiser):
    """Classifier-free guidance: ``D_null + scale (D - D_null)`` (Ho & Salimans 2022).

    Args:
        denoiser: A conditional model with a null class.
        scale: 1 = none, which costs one evaluation instead of two.
    """

    def __init__(self, denoiser: Denoiser, scale: float = 1.0) -> None:
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        self.image_shape, self.num_classes = denoiser.image_shape, denoiser.num_classes
        self.null_label, self.few_steps = denoiser.null_label, denoiser.few_steps
        self.inputs, self.floor, self.codec = denoiser.inputs, denoiser.floor, denoiser.codec

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`.

        Raises:
            ValueError: If the scale is not 1 and there is nothing to guide by.
        """
        if self.scale == 1:
            return self.denoiser(x, sigma, condition)
        null = self.denoiser.null(condition)
        if null is condition:
            raise ValueError(
                f"guidance={self.scale} needs a condition (labels or prompts); "
                "use guidance 1 for an unconditional model."
            )
        conditional = self.denoiser(x, sigma, condition)
        unconditional = self.denoiser(x, sigma, null)
        return torch.lerp(unconditional, conditional, self.scale)

    def start(self, noise: Tensor) -> Tensor:
        """As the guided model."""
        return self.denoiser.start(noise)

    def sigmas(self, steps: int) -> Tensor:
        """As the guided model."""
        return self.denoiser.sigmas(steps)

    def signal_scale(self, sigma: Tensor) -> Tensor:
        """As the guided model."""
        return self.denoiser.signal_scale(sigma)

    def schedule(self, u: Tensor) -> Tensor:
        """As the guided model."""
        return self.denoiser.schedule(u)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """As the guided model."""
        return self.denoiser.loss_weight(sigma)

    def null(self, condition: Condition) -> Condition:
        """As the guided model."""
        return self.denoiser.null(condition)

    def start_from(self, sigma: float) -> None:
        """Lower the guided model's start."""
        self.denoiser.start_from(sigma)
        self.sigma_max = self.denoiser.sigma_max

    def settings(self) -> dict[str, Any]:
        """The scale beside the guided model's class and numbers."""
        guided = {"denoiser": type(self.denoiser).__name__, **self.denoiser.settings()}
        return {"scale": self.scale, **guided}
