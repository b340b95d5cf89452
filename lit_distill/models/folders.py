"""Denoisers in folders of diffusers' own format.

The scheduler's configuration says what the network predicts. What no scheduler can say stands in
``lit_distill.json`` beside ``model_index.json``; a folder without it is read by its scheduler.
"""

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from lit_distill.diffusion import (
    ConsistencyDenoiser,
    Denoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FlowDenoiser,
    NetworkDenoiser,
    VelocityDenoiser,
)
from lit_distill.models.networks import UNet

_CLASSES: dict[str, type[NetworkDenoiser]] = {
    cls.__name__: cls
    for cls in (EDMDenoiser, EpsilonDenoiser, VelocityDenoiser, FlowDenoiser, ConsistencyDenoiser)
}
_TABLE_CLASSES = {"epsilon": EpsilonDenoiser, "v_prediction": VelocityDenoiser}
_SIDECAR = "lit_distill.json"


def save_denoiser(denoiser: Denoiser, folder: str | Path) -> None:
    """Write a denoiser as a diffusers folder (safetensors), whole or not at all.

    Args:
        denoiser: A network's denoiser with a :class:`UNet`.
        folder: Where to; what is there is replaced once the new folder is complete.

    Raises:
        ValueError: If there is no stock format for this denoiser.
    """
    pipeline = _pipeline(denoiser)
    sidecar = {
        "format": 1,
        "denoiser": type(denoiser).__name__,
        "settings": denoiser.settings(),
        "num_classes": denoiser.num_classes,
        "null_label": denoiser.null_label,
        "steps": denoiser.trained_steps,
    }
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        pipeline.save_pretrained(draft, safe_serialization=True)
        (draft / _SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")
        draft.chmod(0o755)  # mkdtemp keeps others out
        if target.exists():
            old = draft.with_name(draft.name + "-old")
            os.replace(target, old)
            os.replace(draft, target)
            shutil.rmtree(old)
        else:
            os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load_denoiser(path_or_hub_id: str | Path) -> NetworkDenoiser:
    """Read a denoiser from a diffusers folder or from the hub.

    Args:
        path_or_hub_id: A local folder, or a hub id such as ``google/ddpm-cifar10-32``.

    Returns:
        The denoiser, float32, in eval mode.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub cannot be reached.
        ValueError: If the folder holds no network and scheduler that this project knows.
    """
    folder = _local_folder(path_or_hub_id)
    unet_folder = _component(folder, "unet", "config.json")
    class_name = _read_json(unet_folder / "config.json").get("_class_name")
    if class_name != "UNet2DModel":
        raise ValueError(
            f"The network in {unet_folder} is a {class_name}; UNet2DModel is what can be loaded."
        )
    try:
        unet = UNet2DModel.from_pretrained(unet_folder)
    except OSError as error:
        raise FileNotFoundError(
            f"The network's weights in {unet_folder} cannot be read ({error}). Export or download "
            "the folder again."
        ) from error
    sidecar_file = folder / _SIDECAR
    if sidecar_file.is_file():
        denoiser = _from_sidecar(unet, _read_json(sidecar_file), sidecar_file)
    else:
        denoiser = _from_scheduler(unet, _component(folder, "scheduler", "scheduler_config.json"))
    return denoiser.eval()


def _local_folder(path_or_hub_id: str | Path) -> Path:
    """The folder itself, or a snapshot of the hub's."""
    folder, name = Path(path_or_hub_id), str(path_or_hub_id)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"{folder} is not a diffusers folder: it has no model_index.json. Give the folder "
                "that a pipeline was saved to, for example runs/digits/teacher/pipeline."
            )
        return folder
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "runs/"))
    if not looks_like_hub_id:
        raise FileNotFoundError(
            f"There is no folder {name}. Train a teacher first (lit-distill fit --config "
            "configs/digits/teacher.yaml), or name another folder or a hub id."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except Exception as error:  # the client raises errors of many kinds without a common base
        raise FileNotFoundError(
            f"There is no local folder {name}, and it could not be fetched from the hub "
            f"({type(error).__name__}). Download it where there is a network and give the folder."
        ) from error


def _component(folder: Path, name: str, config: str) -> Path:
    """A component's folder; old hub repositories keep their files at the root."""
    for candidate in (folder / name, folder):
        if (candidate / config).is_file():
            return candidate
    raise ValueError(
        f"{folder} has no {name}/{config}: a diffusion model needs a unet/ and a scheduler/."
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Export the folder again.") from error
    return dict(content)


def _from_sidecar(unet: UNet2DModel, sidecar: dict[str, Any], file: Path) -> NetworkDenoiser:
    """Build what ``lit_distill.json`` describes."""
    name = sidecar.get("denoiser")
    if name not in _CLASSES:
        raise ValueError(f"{file} names the denoiser {name!r}; known are {', '.join(_CLASSES)}.")
    network = UNet.wrap(unet, sidecar.get("num_classes"), sidecar.get("null_label"))
    denoiser = _CLASSES[name](network, **sidecar.get("settings", {}))
    steps = sidecar.get("steps")
    denoiser.trained_steps = None if steps is None else tuple(steps)
    return denoiser


def _from_scheduler(unet: UNet2DModel, folder: Path) -> NetworkDenoiser:
    """Build what a foreign scheduler's configuration describes."""
    config = _read_json(folder / "scheduler_config.json")
    name = config.get("_class_name", "")
    network = UNet.wrap(unet)
    if name == "FlowMatchEulerDiscreteScheduler":
        return FlowDenoiser(network)
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        keys = ("sigma_min", "sigma_max", "sigma_data")
        return EDMDenoiser(network, **{k: config[k] for k in keys if k in config}, time_scale=1.0)
    if name == "CMStochasticIterativeScheduler":
        keys = ("sigma_min", "sigma_max", "sigma_data")
        steps = config.get("num_train_timesteps", 40)
        settings = {k: config[k] for k in keys if k in config}
        return ConsistencyDenoiser(network, **settings, num_timesteps=steps)
    scheduler = getattr(diffusers, name).from_config(config) if hasattr(diffusers, name) else None
    if not hasattr(scheduler, "betas") or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"The scheduler {name or '(none)'} in {folder} is none that says what the network "
            "predicts; DDPM, DDIM, EDM, consistency and flow-matching schedulers do."
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _TABLE_CLASSES:
        raise ValueError(
            f"The scheduler in {folder} says prediction_type={prediction!r}; "
            f"{', '.join(_TABLE_CLASSES)} are known."
        )
    if config.get("clip_sample", False) or config.get("thresholding", False):
        warnings.warn(
            f"The scheduler in {folder} clips its estimates of x0 (clip_sample or thresholding). "
            "Here they are not clipped, so that samples differ slightly from that pipeline's.",
            stacklevel=3,
        )
    return _TABLE_CLASSES[prediction](network, betas=scheduler.betas)


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


def _ddim_scheduler(denoiser: EpsilonDenoiser | VelocityDenoiser) -> DDIMScheduler:
    """Trailing times, as the denoiser's own grid; a lowered start is a shortened table."""
    betas = denoiser.betas[: denoiser.last + 1].to(torch.float64)
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type="epsilon" if isinstance(denoiser, EpsilonDenoiser) else "v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
