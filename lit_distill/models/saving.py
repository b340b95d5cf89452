"""Denoisers to folders of diffusers' own format.

The scheduler says what the network predicts. What no scheduler can say stands in
``lit_distill.json`` beside ``model_index.json``. A student that no stock pipeline samples brings
its own, see :mod:`lit_distill.models.few_step_pipeline`.
"""

import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
)

from lit_distill.diffusion import (
    ConsistencyDenoiser,
    Denoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FewSteps,
    FlowDenoiser,
    LatentConsistencyDenoiser,
    VelocityDenoiser,
)
from lit_distill.models.condition_embedding import ConditionEmbedding
from lit_distill.models.few_step_pipeline import FewStepPipeline
from lit_distill.models.lora import merged
from lit_distill.models.mnist_unet import MNISTUNet
from lit_distill.models.text_to_image import TextUNet, without_bars
from lit_distill.models.whole_folder import whole_folder

SIDECAR = "lit_distill.json"
CARD = "README.md"
MARKER = "<!-- lit_distill writes this card anew at every export; delete this line to keep it. -->"
FORMAT = 1
_CONSISTENCY_TIME_SCALE = 1000  # CMStochasticIterativeScheduler asks at 1000 ln(sigma) / 4
_FLOW_TIME_SCALE = 1000  # FlowMatchEulerDiscreteScheduler asks at 1000 t


def save_denoiser(denoiser: Denoiser, folder: str | Path) -> None:
    """Write a denoiser as a diffusers folder (safetensors), whole or not at all.

    A teacher, and a student that a stock pipeline samples as :func:`lit_distill.diffusion.sample`
    does, open in that pipeline. Any other student opens by
    ``DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)``.

    Args:
        denoiser: A network's denoiser with a :class:`UNet` or a :class:`TextUNet`.
        folder: Where to; what is there is replaced once the new folder is complete, but for a
            model card (``README.md``) of the user's own.

    Raises:
        ValueError: If there is no stock format for this denoiser, or something else than such a
            folder is in the way.
    """
    denoiser = merged(denoiser)
    pipeline = _pipeline(denoiser)
    sidecar = {
        "format": FORMAT,
        "denoiser": type(denoiser).__name__,
        "settings": denoiser.settings(),
        "num_classes": denoiser.num_classes,
        "null_label": denoiser.null_label,
        "patch_size": getattr(denoiser.network, "patch_size", 1),
        "few_steps": None if denoiser.few_steps is None else asdict(denoiser.few_steps),
    }
    with folder_in_place(folder) as draft:
        with without_bars():
            pipeline.save_pretrained(draft, safe_serialization=True)
        if isinstance(pipeline, FewStepPipeline):
            _add_code(draft, pipeline)
        (draft / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")


@contextmanager
def folder_in_place(folder: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of another once the block has ended well.

    Args:
        folder: Where to; a diffusers folder that is there is replaced, but for a model card of the
            user's own.

    Raises:
        ValueError: If something else than a diffusers folder is in the way.
    """
    target = Path(folder).absolute()
    _check_replaceable(target)
    with whole_folder(target) as draft:
        yield draft
        if has_own_card(target):
            shutil.copyfile(target / CARD, draft / CARD)


def has_own_card(folder: str | Path) -> bool:
    """Whether a folder has a model card that is a person's own, as it does not carry our marker."""
    file = Path(folder) / CARD
    return file.is_file() and MARKER not in file.read_text(encoding="utf-8", errors="replace")


def _check_replaceable(target: Path) -> None:
    """Refuse to replace what no earlier export can be: a mistyped name must not cost a folder."""
    if not target.exists() or (target / "model_index.json").is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise ValueError(
            f"{target} exists and is not a diffusers folder, so that it is not replaced: name "
            "another folder, or remove it first."
        )


def _add_code(folder: Path, pipeline: FewStepPipeline) -> None:
    """Put the code that a folder needs without lit_distill into it, and say where it stands."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    shutil.copyfile(inspect.getfile(FewStepPipeline), folder / "pipeline.py")
    index["_class_name"] = ["pipeline", FewStepPipeline.__name__]
    for name, component in pipeline.components.items():
        if isinstance(component, ConditionEmbedding | MNISTUNet):
            code = Path(inspect.getfile(type(component)))
            shutil.copyfile(code, folder / name / code.name)
            index[name] = [code.stem, type(component).__name__]
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _pipeline(denoiser: Denoiser) -> DiffusionPipeline:
    """The pipeline that samples this denoiser: a stock one where there is one."""
    network: Any = getattr(denoiser, "network", None)
    if isinstance(network, TextUNet):
        return _text_pipeline(denoiser, network)
    unet = getattr(network, "unet", None)
    if not isinstance(unet, UNet2DModel | MNISTUNet):
        raise ValueError(
            f"A {type(denoiser).__name__} around a {type(network).__name__} has no diffusers "
            "format; export needs a lit_distill.models.UNet."
        )
    stock, scheduler = _stock(denoiser)
    plain = isinstance(unet, UNet2DModel) and network.patch_size == 1
    if plain and _stock_samples_alike(denoiser):
        return stock(unet, scheduler)
    return _few_step_pipeline(
        denoiser, unet, scheduler, conditions=getattr(network, "conditions", None)
    )


def _few_step_pipeline(
    denoiser: Denoiser, unet: Any, scheduler: Any, **components: Any
) -> FewStepPipeline:
    """The pipeline that brings its own code."""
    few = denoiser.few_steps
    # What is no student takes any number of steps.
    sampling = asdict(FewSteps((1,))) | {"trained": ()} if few is None else asdict(few)
    settings = {k: v for k, v in denoiser.settings().items() if k != "betas"}  # the scheduler's
    return FewStepPipeline(
        unet,
        scheduler,
        **components,
        denoiser=type(denoiser).__name__,
        settings=settings,
        few_steps=sampling,
        num_classes=denoiser.num_classes,
        null_label=denoiser.null_label,
        patch_size=getattr(denoiser.network, "patch_size", 1),
    )


def _text_pipeline(denoiser: Denoiser, network: TextUNet) -> DiffusionPipeline:
    """An ordinary text-to-image pipeline."""
    if isinstance(denoiser, LatentConsistencyDenoiser):
        scheduler, alike = _lcm_scheduler(denoiser), _as_lcm(denoiser)
    else:
        (_, scheduler), alike = _stock(denoiser), _stock_samples_alike(denoiser)
        # The pipeline scales its noise as the scheduler says, and that of flows says nothing.
        alike = alike and not isinstance(denoiser, FlowDenoiser)
    codec = network.codec
    frozen = {
        "vae": codec.vae,
        "text_encoder": codec.text_encoder,
        "tokenizer": codec.tokenizer,
    }
    if not alike:
        return _few_step_pipeline(denoiser, network.unet, scheduler, **frozen)
    if isinstance(scheduler, DDIMScheduler):  # the pipeline asks for it; trailing times ignore it
        scheduler.register_to_config(steps_offset=1)
    return StableDiffusionPipeline(
        **frozen,
        unet=network.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stock(denoiser: Denoiser) -> tuple[type[DiffusionPipeline], Any]:
    """The stock pipeline and scheduler that come nearest to a denoiser."""
    if isinstance(denoiser, EDMDenoiser):
        if denoiser.time_scale != _CONSISTENCY_TIME_SCALE:  # no stock pipeline asks at such times
            return DDPMPipeline, _edm_scheduler(denoiser)
        return ConsistencyModelPipeline, _consistency_scheduler(denoiser)
    if isinstance(denoiser, LatentConsistencyDenoiser):
        return DDIMPipeline, _lcm_scheduler(denoiser)
    if isinstance(denoiser, EpsilonDenoiser | VelocityDenoiser):
        return DDIMPipeline, _ddim_scheduler(denoiser)
    if isinstance(denoiser, FlowDenoiser):
        return DDPMPipeline, FlowMatchEulerDiscreteScheduler()
    raise ValueError(f"There is no diffusers format for a {type(denoiser).__name__}.")


def _stock_samples_alike(denoiser: Denoiser) -> bool:
    """Whether the stock pipeline samples a student as it was trained to be.

    A teacher is sampled by any solver, so that its pipeline need not be right but for its network.
    """
    few = denoiser.few_steps
    if isinstance(denoiser, LatentConsistencyDenoiser):
        return False  # but of latents, which is settled elsewhere
    if denoiser.inputs:  # a stock pipeline tells a network its time and its label only
        return False
    if getattr(denoiser, "image_range", (-1, 1)) != (-1, 1):  # and it expects no other
        return False
    if few is None:
        return not isinstance(denoiser, FlowDenoiser) or denoiser.time_scale == _FLOW_TIME_SCALE
    one_step = all(steps == 1 for steps in few.trained)
    own = not few.analytical_first_step and all(_own_grid(denoiser, n) for n in few.trained)
    if isinstance(denoiser, EDMDenoiser):
        again = isinstance(denoiser, ConsistencyDenoiser) and few.gamma == 1
        return own and denoiser.time_scale == _CONSISTENCY_TIME_SCALE and (one_step or again)
    if denoiser.num_classes is not None:  # the other stock pipelines pass no labels
        return False
    if isinstance(denoiser, EpsilonDenoiser | VelocityDenoiser):
        # Where the number of steps does not divide that of times, the stock scheduler's jumps end
        # elsewhere than they go on.
        times = denoiser.last + 1
        return own and (one_step or few.gamma == 0) and all(times % n == 0 for n in few.trained)
    assert isinstance(denoiser, FlowDenoiser)
    # The stock scheduler's grid is not uniform in t, and starts at t = 1.
    starts_at_noise = float(denoiser.path_time(torch.tensor(denoiser.sigma_max))) == 1
    return own and one_step and starts_at_noise and denoiser.time_scale == _FLOW_TIME_SCALE


def _own_grid(denoiser: Denoiser, steps: int) -> bool:
    """Whether a student's levels for this number of steps are what its class has anyway."""
    assert denoiser.few_steps is not None
    grid = denoiser.few_steps.grid(steps)
    if grid is None:
        return True
    try:
        return torch.allclose(grid, denoiser.sigmas(steps), rtol=1e-6, atol=0)
    except ValueError:  # more steps than its class has levels
        return False


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


def _as_lcm(denoiser: LatentConsistencyDenoiser) -> bool:
    """Whether a student jumps to the end and back up, at the times of diffusers' scheduler."""
    few = denoiser.few_steps
    again = few is not None and (few.gamma == 1 or few.trained == (1,))
    return again and few is not None and all(_own_grid(denoiser, n) for n in few.trained)


def _lcm_scheduler(denoiser: LatentConsistencyDenoiser) -> LCMScheduler:
    return LCMScheduler(
        num_train_timesteps=len(denoiser.betas),
        trained_betas=denoiser.betas.tolist(),
        prediction_type=denoiser.prediction,
        original_inference_steps=denoiser.grid_steps,
        timestep_scaling=denoiser.time_scaling,
        steps_offset=1,  # the pipeline asks for it; these times ignore it
        clip_sample=False,
    )


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
