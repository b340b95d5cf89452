"""Denoisers to folders of diffusers' own format.

The scheduler says what the network predicts. What no scheduler can say stands in
``lit_distill.json`` beside ``model_index.json``.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from lit_distill.diffusion import (
    ConsistencyDenoiser,
    Denoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FlowDenoiser,
    VelocityDenoiser,
)

SIDECAR = "lit_distill.json"
FORMAT = 1
_CONSISTENCY_TIME_SCALE = 1000  # CMStochasticIterativeScheduler asks at 1000 ln(sigma) / 4


def save_denoiser(denoiser: Denoiser, folder: str | Path) -> None:
    """Write a denoiser as a diffusers folder (safetensors), whole or not at all.

    Args:
        denoiser: A network's denoiser with a :class:`UNet`.
        folder: Where to; what is there is replaced once the new folder is complete.

    Raises:
        ValueError: If there is no stock format for this denoiser, or something else than such a
            folder is in the way.
    """
    pipeline = _pipeline(denoiser)
    sidecar = {
        "format": FORMAT,
        "denoiser": type(denoiser).__name__,
        "settings": denoiser.settings(),
        "num_classes": denoiser.num_classes,
        "null_label": denoiser.null_label,
        "few_steps": None if denoiser.few_steps is None else asdict(denoiser.few_steps),
    }
    target = Path(folder).absolute()
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        pipeline.save_pretrained(draft, safe_serialization=True)
        (draft / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")
        draft.chmod(0o755)  # mkdtemp keeps others out
        _replace(target, draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    """Refuse to replace what no earlier export can be: a mistyped name must not cost a folder."""
    if not target.exists() or (target / "model_index.json").is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise ValueError(
            f"{target} exists and is not a diffusers folder, so that it is not replaced: name "
            "another folder, or remove it first."
        )


def _replace(target: Path, draft: Path) -> None:
    """Put a complete folder in the place of an old one, which comes back if that fails."""
    if not target.exists():
        os.replace(draft, target)
        return
    old = draft.with_name(draft.name + "-old")
    os.replace(target, old)
    try:
        os.replace(draft, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _pipeline(denoiser: Denoiser) -> DiffusionPipeline:
    """The stock pipeline that runs this denoiser."""
    network = getattr(denoiser, "network", None)
    unet = getattr(network, "unet", None)
    if not isinstance(unet, UNet2DModel):
        raise ValueError(
            f"A {type(denoiser).__name__} around a {type(network).__name__} has no diffusers "
            "format; export needs a lit_distill.models.UNet."
        )
    if isinstance(denoiser, EDMDenoiser):
        if denoiser.time_scale != _CONSISTENCY_TIME_SCALE:  # no stock pipeline asks at such times
            return DDPMPipeline(unet, _edm_scheduler(denoiser))
        return ConsistencyModelPipeline(unet, _consistency_scheduler(denoiser))
    if isinstance(denoiser, EpsilonDenoiser | VelocityDenoiser):
        return DDIMPipeline(unet, _ddim_scheduler(denoiser))
    if isinstance(denoiser, FlowDenoiser):
        return DDPMPipeline(unet, FlowMatchEulerDiscreteScheduler())
    raise ValueError(f"There is no diffusers format for a {type(denoiser).__name__}.")


def _consistency_scheduler(denoiser: EDMDenoiser) -> CMStochasticIterativeScheduler:
    """One jump of it is one evaluation of the denoiser."""
    # EDM's scalings are the consistency model's with a boundary at 0; at 1e-6 they agree to 6e-8,
    # at 0.01 only to 2e-4.
    sigma_min, num_timesteps = 1e-6, 40
    if isinstance(denoiser, ConsistencyDenoiser):
        sigma_min, num_timesteps = denoiser.sigma_min, denoiser.num_timesteps
    return CMStochasticIterativeScheduler(
        num_train_timesteps=num_timesteps,
        sigma_min=sigma_min,
        sigma_max=denoiser.sigma_max,
        sigma_data=denoiser.sigma_data,
        clip_denoised=False,
    )


def _edm_scheduler(denoiser: EDMDenoiser) -> EDMEulerScheduler:
    return EDMEulerScheduler(denoiser.sigma_min, denoiser.sigma_max, denoiser.sigma_data)


def _ddim_scheduler(denoiser: EpsilonDenoiser | VelocityDenoiser) -> DDIMScheduler:
    """Trailing times, as the denoiser's own grid; a lowered start is a shortened table."""
    betas = denoiser.betas[: denoiser.last + 1]
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type="epsilon" if isinstance(denoiser, EpsilonDenoiser) else "v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
