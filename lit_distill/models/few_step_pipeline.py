"""Sampling of a few-step student in plain diffusers.

The folder of a student that no stock pipeline samples holds a copy of this file as ``pipeline.py``
and opens without lit_distill, as it needs torch and diffusers only (a text-to-image student
transformers too)::

    DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)

All levels are those of ``x_sigma = x0 + sigma * noise``.
"""

import math
import warnings
from bisect import bisect_right
from itertools import pairwise
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.utils import is_transformers_available
from diffusers.utils.torch_utils import randn_tensor

if is_transformers_available():
    from transformers import CLIPTextModel, CLIPTokenizer
else:  # of text-to-image students only
    CLIPTextModel = CLIPTokenizer = ModelMixin  # type: ignore[misc]


class _Edm:
    """EDM: the network is asked at ``time_scale ln(sigma) / 4``."""

    floor = 0.0  # noise left in an estimate of x0
    pixel_scale, pixel_shift = 1.0, 0.0  # from [-1, 1] to the range that the network knows

    def __init__(self, settings: dict[str, Any], betas: list[float] | None) -> None:
        self.settings = settings
        self.sigma_min, self.sigma_max = settings["sigma_min"], settings["sigma_max"]

    @property
    def start(self) -> float:
        """Factor from unit noise to the first state, in the network's own range of pixels."""
        return self.sigma_max

    def rho_level(self, u: float) -> float:
        """Level that is uniform in ``sigma ** (1 / 7)``: from sigma_min (0) to sigma_max (1)."""
        low, high = self.sigma_min ** (1 / 7), self.sigma_max ** (1 / 7)
        return (low + u * (high - low)) ** 7

    def grid(self, jumps: int) -> list[float]:
        """The model's own levels, from sigma_max to 0."""
        shares = [i / (jumps - 1) if jumps > 1 else 0.0 for i in range(jumps)]
        return [*(self.rho_level(1 - share) for share in shares), 0.0]

    def time(self, sigma: float) -> float:
        """The network's time at a level."""
        return self.settings["time_scale"] / 4 * math.log(sigma)

    def scalings(self, sigma: float) -> tuple[float, float, float]:
        """``c_skip``, ``c_out`` and ``c_in`` of ``D = c_skip x + c_out F(c_in x)``.

        All of them in the network's own range of pixels, the level too.
        """
        sd = self.settings["sigma_data"]
        total = sigma**2 + sd**2
        return sd**2 / total, sigma * sd / total**0.5, total**-0.5


class _Consistency(_Edm):
    """As EDM, with ``D(x, sigma_min) = x``."""

    def __init__(self, settings: dict[str, Any], betas: list[float] | None) -> None:
        super().__init__(settings, betas)
        self.floor = self.sigma_min

    def grid(self, jumps: int) -> list[float]:
        count = self.settings["num_timesteps"]
        if jumps > count:
            raise ValueError(f"{jumps} steps are more than the {count} levels of this student.")
        shares = [i * (count // jumps) / max(count - 1, 1) for i in range(jumps)]
        return [*(self.rho_level(1 - share) for share in shares), 0.0]

    def scalings(self, sigma: float) -> tuple[float, float, float]:
        sd, above = self.settings["sigma_data"], sigma - self.sigma_min
        total = sigma**2 + sd**2
        return sd**2 / (above**2 + sd**2), above * sd / total**0.5, total**-0.5


class _Epsilon(_Edm):
    """The noise, at the times of a DDPM table."""

    def __init__(self, settings: dict[str, Any], betas: list[float] | None) -> None:
        self.settings, kept = settings, 1.0
        black, white = settings.get("image_range", (-1.0, 1.0))
        self.pixel_scale, self.pixel_shift = (white - black) / 2, (white + black) / 2
        self.levels: list[float] = []
        for beta in betas or []:
            kept *= 1 - beta
            remains = max(kept, 1e-9)  # no finite level stands for pure noise
            self.levels.append(((1 - remains) / remains) ** 0.5 / self.pixel_scale)
        self.sigma_min, self.sigma_max = self.levels[0], self.levels[-1]

    @property
    def start(self) -> float:
        return (1 + (self.pixel_scale * self.sigma_max) ** 2) ** 0.5

    def grid(self, jumps: int) -> list[float]:
        count = len(self.levels)
        if jumps > count:
            raise ValueError(f"{jumps} steps are more than the {count} times of this student.")
        times = [round(i * (count / jumps)) - 1 for i in range(jumps, 0, -1)]
        return [*(self.levels[time] for time in times), 0.0]

    def time(self, sigma: float) -> float:
        sigma = min(max(sigma, self.sigma_min), self.sigma_max)
        high = min(max(bisect_right(self.levels, sigma), 1), len(self.levels) - 1)
        low, width = self.levels[high - 1], math.log(self.levels[high] / self.levels[high - 1])
        time = high - 1 + math.log(sigma / low) / width
        nearest = round(time)
        # A level of the table asks for its own integer time.
        return float(nearest) if self.settings["discrete"] or abs(time - nearest) < 1e-3 else time

    def scalings(self, sigma: float) -> tuple[float, float, float]:
        return 1.0, -sigma, (1 + sigma**2) ** -0.5


class _Velocity(_Epsilon):
    """``v``, at the times of a DDPM table."""

    def scalings(self, sigma: float) -> tuple[float, float, float]:
        alpha = (1 + sigma**2) ** -0.5
        return alpha**2, -alpha * sigma, alpha


class _LatentConsistency(_Epsilon):
    """As the two before, with ``D`` the state itself at the time 0."""

    def scalings(self, sigma: float) -> tuple[float, float, float]:
        alpha, s = (1 + sigma**2) ** -0.5, self.settings["time_scaling"] * self.time(sigma)
        skip, out = 0.25 / (s**2 + 0.25), s / (s**2 + 0.25) ** 0.5
        kind = _Velocity if self.settings["prediction"] == "v_prediction" else _Epsilon
        c_skip, c_out, c_in = kind.scalings(self, sigma)
        return skip * alpha + out * c_skip, out * c_out, c_in

    def grid(self, jumps: int) -> list[float]:
        count = self.settings["grid_steps"]
        if jumps > count:
            raise ValueError(f"{jumps} steps are more than the {count} times of this student.")
        length = len(self.levels) // count
        times = [(count - i * count // jumps) * length - 1 for i in range(jumps)]
        return [*(self.levels[time] for time in times), 0.0]


class _Flow(_Edm):
    """``noise - x0`` on the straight path, at ``time_scale t`` with ``t = sigma / (1 + sigma)``."""

    @property
    def start(self) -> float:
        return 1 + self.sigma_max

    def path_time(self, sigma: float) -> float:
        return 1.0 if sigma >= 1e6 else sigma / (1 + sigma)  # no finite level is t = 1

    def grid(self, jumps: int) -> list[float]:
        top = self.path_time(self.sigma_max)
        times = [top * (jumps - i) / jumps for i in range(1, jumps)]
        return [self.sigma_max, *(max(t / (1 - t), self.sigma_min) for t in times), 0.0]

    def time(self, sigma: float) -> float:
        return self.settings.get("time_scale", 1000) * self.path_time(sigma)

    def scalings(self, sigma: float) -> tuple[float, float, float]:
        return 1 / (1 + sigma), -self.path_time(sigma), 1 / (1 + sigma)


_KINDS: dict[str, type[_Edm]] = {
    "EDMDenoiser": _Edm,
    "ConsistencyDenoiser": _Consistency,
    "EpsilonDenoiser": _Epsilon,
    "VelocityDenoiser": _Velocity,
    "LatentConsistencyDenoiser": _LatentConsistency,
    "FlowDenoiser": _Flow,
}


class FewStepPipeline(DiffusionPipeline):
    """Samples a student by jumps between noise levels, as it was trained.

    Args:
        unet: The network, called as diffusers' ``UNet2DModel``.
        scheduler: Its configuration holds the variance schedule of a DDPM network. The levels to
            sample on stand in ``few_steps``, so that no other scheduler can take its place.
        conditions: Embeds what the network is conditional on, where that is more than a label.
        vae: Makes images of what a text-to-image network samples.
        text_encoder: Embeds its prompts.
        tokenizer: Cuts them into tokens.
        denoiser: What the network predicts and how it is asked, a key of ``_KINDS``.
        settings: Numbers of that parameterisation.
        few_steps: ``trained``, numbers of steps; ``grids`` of levels, one for each number;
            ``only``, whether other numbers are refused; ``gamma``, share of fresh noise between
            the jumps; ``analytical_first_step``, whether the first jump asks no network.
        num_classes: Number of classes, or None for an unconditional student.
        null_label: The label that stands for "no label", if there is one.
        patch_size: Side of the squares of pixels that are one pixel to the network.
    """

    _optional_components: ClassVar[list[str]] = ["conditions", "vae", "text_encoder", "tokenizer"]
    model_cpu_offload_seq = "text_encoder->conditions->unet->vae"

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        conditions: ModelMixin | None = None,
        vae: AutoencoderKL | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        denoiser: str = "EDMDenoiser",
        settings: dict | None = None,
        few_steps: dict | None = None,
        num_classes: int | None = None,
        null_label: int | None = None,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            conditions=conditions,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            denoiser=denoiser,
            settings=settings,
            few_steps=few_steps,
            num_classes=num_classes,
            null_label=null_label,
            patch_size=patch_size,
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: torch.Tensor | list[int] | int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        prompt: str | list[str] | None = None,
    ) -> Any:
        """Draw images.

        Args:
            batch_size: How many.
            class_labels: One label for each image, or one for all; of conditional students only.
            num_inference_steps: Network evaluations; by default the first number that the student
                was trained for.
            guidance_scale: Scale of classifier-free guidance; 1 is none, others cost twice as much.
            generator: Source of the first noise and of that between jumps. A list has one for each
                image, so that an image does not depend on its batch.
            output_type: ``pil``, ``np`` (B, H, W, C) or ``pt`` (B, C, H, W), both in [0, 1].
            return_dict: Return an object with ``images`` instead of a tuple.
            prompt: What the images shall show, of text-to-image students only: one text, or one
                for each image, which says how many there are.

        Raises:
            ValueError: If an argument does not fit the student.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r} is unknown; choose pil, np or pt.")
        device, few = self._execution_device, self.config.few_steps
        model = _KINDS[self.config.denoiser](
            self.config.settings, self.scheduler.config.get("trained_betas")
        )
        if isinstance(prompt, list):
            batch_size = len(prompt)
        prompts = self._prompts(prompt, batch_size, guidance_scale)
        asked: Any = prompts
        if prompts is None:
            asked = self._labels(class_labels, batch_size, guidance_scale)
        steps = self._steps(num_inference_steps)
        levels = self._levels(model, steps)
        # The state stays in float32, whatever the network's precision.
        x = model.start * randn_tensor(
            self._shape(batch_size), generator=generator, device=device, dtype=torch.float32
        )
        x = (x - model.pixel_shift) / model.pixel_scale
        jumps = len(levels) - 1
        with self.progress_bar(total=jumps) as bar:
            for i, (sigma, to_sigma) in enumerate(pairwise(levels)):
                # Down to a lower level, and up again by fresh noise (Kim et al. 2024, Algorithm 3).
                share = few["gamma"] if i < jumps - 1 else 0.0
                lower = (1 - share**2) ** 0.5 * to_sigma
                if i == 0 and few["analytical_first_step"]:
                    x0 = x - sigma * (1 + sigma**2) ** -0.5 * x
                else:
                    x0 = self._denoise(model, x, sigma, lower, steps, asked, guidance_scale)
                x = x0 + lower / sigma * (x - x0)
                missing = to_sigma**2 - lower**2 - model.floor**2
                if missing > 0:
                    x = x + missing**0.5 * randn_tensor(
                        x.shape, generator=generator, device=device, dtype=x.dtype
                    )
                bar.update()
        if self.vae is not None:
            latents = x.to(self.vae.dtype) / self.vae.config.scaling_factor
            x = self.vae.decode(latents).sample.float()
        images: Any = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(
        self,
        model: _Edm,
        x: torch.Tensor,
        sigma: float,
        to_sigma: float,
        steps: int,
        labels: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None] | None,
        scale: float,
    ) -> torch.Tensor:
        """Estimate ``x0`` from ``x`` (B, C, H, W) at ``sigma``, with guidance."""
        if isinstance(labels, tuple):
            return self._denoise_prompts(model, x, sigma, *labels, scale)
        numbers = {"to_sigma": model.time(max(to_sigma, model.sigma_min)), "steps": steps}
        c_skip, c_out, c_in = model.scalings(model.pixel_scale * sigma)
        own, patch = model.pixel_scale * x + model.pixel_shift, self.config.patch_size

        def estimate(labels: torch.Tensor | None) -> torch.Tensor:
            embedded = labels
            if self.conditions is not None:
                wanted = self.conditions.config.inputs
                given = {
                    name: torch.full((len(x),), value, device=x.device)
                    for name, value in numbers.items()
                    if name in wanted
                }
                if labels is not None:
                    given["label"] = labels
                embedded = self.conditions(len(x), given)
            time = torch.full((len(x),), model.time(sigma), device=x.device)
            scaled = torch.pixel_unshuffle(c_in * own, patch).to(self.unet.dtype)
            out = self.unet(scaled, time, class_labels=embedded, return_dict=False)[0]
            x0 = c_skip * own + c_out * torch.pixel_shuffle(out.to(x.dtype), patch)
            return (x0 - model.pixel_shift) / model.pixel_scale

        if scale == 1 or labels is None:  # without labels no other scale got so far
            return estimate(labels)
        null = torch.full_like(labels, self.config.null_label)
        return torch.lerp(estimate(null), estimate(labels), scale)

    def _denoise_prompts(
        self,
        model: _Edm,
        x: torch.Tensor,
        sigma: float,
        prompts: torch.Tensor,
        empty: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """The same of a network that is conditional on prompts ``(B, L, D)``."""
        c_skip, c_out, c_in = model.scalings(sigma)
        time = torch.full((len(x),), model.time(sigma), device=x.device)
        scaled = (c_in * x).to(self.unet.dtype)

        def estimate(embeddings: torch.Tensor) -> torch.Tensor:
            out = self.unet(scaled, time, embeddings.to(scaled.dtype), return_dict=False)[0]
            return c_skip * x + c_out * out.to(x.dtype)

        if empty is None:
            return estimate(prompts)
        return torch.lerp(estimate(empty), estimate(prompts), scale)

    def _prompts(
        self, asked: str | list[str] | None, count: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """One embedded prompt for each image ``(B, L, D)``, and the empty one for guidance."""
        if self.vae is None:
            if asked is not None:
                raise ValueError("This student takes no prompts: leave prompt out.")
            return None
        if asked is None:
            raise ValueError("This is a text-to-image student: say what to draw, prompt=...")
        texts = asked if isinstance(asked, list) else [asked] * count

        def embed(texts: list[str]) -> torch.Tensor:
            ids = self.tokenizer(
                texts,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            return self.text_encoder(ids.to(self._execution_device))[0]

        return embed(texts), None if scale == 1 else embed([""] * count)

    def _steps(self, asked: int | None) -> int:
        trained = self.config.few_steps["trained"]
        if asked is None and not trained:
            raise ValueError("This model has no number of steps of its own: say how many.")
        steps = trained[0] if asked is None else asked
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps}: sampling needs at least one step.")
        return steps

    def _levels(self, model: _Edm, steps: int) -> list[float]:
        """The levels that the student was trained for, else its own."""
        few = self.config.few_steps
        if few["trained"] and steps not in few["trained"]:
            known = ", ".join(map(str, few["trained"]))
            if few["only"]:
                raise ValueError(
                    f"num_inference_steps={steps}: this student jumps between the levels it was "
                    f"trained for, and samples in {known} step(s) only."
                )
            warnings.warn(
                f"This student was trained for {known} step(s), not for {steps}.", stacklevel=4
            )
        jumps = steps + few["analytical_first_step"]
        trained = (list(grid) for grid in few["grids"] if len(grid) == jumps + 1)
        return next(trained, None) or model.grid(jumps)

    def _labels(
        self, asked: torch.Tensor | list[int] | int | None, count: int, scale: float
    ) -> torch.Tensor | None:
        """One label for each image ``(B,)``, or None."""
        classes, null = self.config.num_classes, self.config.null_label
        if classes is None:
            if asked is not None:
                raise ValueError("This student is unconditional: leave class_labels out.")
            if scale != 1:
                raise ValueError(f"guidance_scale={scale}: this student is unconditional, use 1.")
            return None
        if asked is None:
            raise ValueError(
                f"This student is conditional on {classes} classes: give class_labels."
            )
        if scale != 1 and null is None:
            raise ValueError(f"guidance_scale={scale}: this student has no null class, use 1.")
        labels = torch.as_tensor(asked, dtype=torch.int64, device=self._execution_device).flatten()
        labels = labels.expand(count) if len(labels) == 1 else labels
        if len(labels) != count:
            raise ValueError(f"{len(labels)} class_labels are given for a batch_size of {count}.")
        known = set(range(classes)) | ({null} - {None})
        unknown = set(labels.tolist()) - known
        if unknown:
            raise ValueError(
                f"class_labels has {min(unknown)}; this student has the classes 0 to {classes - 1}."
            )
        return labels

    def _shape(self, count: int) -> tuple[int, ...]:
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("The network does not say its sample_size, so none can be drawn.")
        sides = (size, size) if isinstance(size, int) else tuple(size)
        patch = self.config.patch_size
        channels = self.unet.config.in_channels // patch**2
        return (count, channels, *(patch * side for side in sides))
