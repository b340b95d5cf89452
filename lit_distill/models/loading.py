"""Denoisers from folders of diffusers' own format, made here or elsewhere.

The scheduler's configuration says what the network predicts; ``lit_distill.json``, where a folder
has it, says more.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
)

from lit_distill.diffusion import (
    ConsistencyDenoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FewSteps,
    FlowDenoiser,
    LatentConsistencyDenoiser,
    NetworkDenoiser,
    VelocityDenoiser,
)
from lit_distill.models.condition_embedding import ConditionEmbedding
from lit_distill.models.mnist_unet import MNISTUNet
from lit_distill.models.networks import UNet
from lit_distill.models.saving import CARD, FORMAT, SIDECAR
from lit_distill.models.text_to_image import LatentCodec, TextUNet, without_bars

_CLASSES: dict[str, type[NetworkDenoiser]] = {
    cls.__name__: cls
    for cls in (
        EDMDenoiser,
        EpsilonDenoiser,
        VelocityDenoiser,
        FlowDenoiser,
        ConsistencyDenoiser,
        LatentConsistencyDenoiser,
    )
}
_TABLE_CLASSES = {"epsilon": EpsilonDenoiser, "v_prediction": VelocityDenoiser}


def load_denoiser(path_or_hub_id: str | Path) -> NetworkDenoiser:
    """Read a denoiser from a diffusers folder or from the hub.

    Args:
        path_or_hub_id: A local folder, or a hub id such as ``google/ddpm-cifar10-32`` or
            ``stable-diffusion-v1-5/stable-diffusion-v1-5``.

    Returns:
        The denoiser, float32, in eval mode. That of a ``StableDiffusionPipeline`` works on latents
        and is conditional on prompts, which its ``codec`` embeds.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub cannot be reached.
        ValueError: If the folder holds no network and scheduler that this project knows.
    """
    folder = _local_folder(path_or_hub_id)
    sidecar_file = folder / SIDECAR
    sidecar = _read_json(sidecar_file) if sidecar_file.is_file() else None
    network = _load_network(folder, sidecar or {})
    if sidecar is not None:
        denoiser = _from_sidecar(network, sidecar, sidecar_file)
    else:
        scheduler_folder = _component(folder, "scheduler", "scheduler_config.json")
        denoiser = _from_scheduler(network, scheduler_folder)
    return denoiser.eval()


def load_codec(path_or_hub_id: str | Path) -> LatentCodec:
    """Read the VAE, the text encoder and the tokenizer of a text-to-image folder, float32.

    Args:
        path_or_hub_id: As for :func:`load_denoiser`.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub cannot be reached.
        ValueError: If the folder lacks one of them.
    """
    return _load_codec(_local_folder(path_or_hub_id))


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
        # Not all of a repository: beside them may lie gigabytes of other components and of the same
        # weights in other formats.
        index = Path(snapshot_download(name, allow_patterns=["model_index.json"]))
        wanted = ["model_index.json", SIDECAR, "unet/*", "scheduler/*", "conditions/*"]
        wanted.append(CARD)  # of which a student's card takes the licence
        old_layout = ["config.json", "scheduler_config.json", "diffusion_pytorch_model.*"]
        left_out = ["*.fp16.*", "*non_ema*"]
        if "text_encoder" in _read_json(index / "model_index.json"):
            wanted += ["vae/*", "text_encoder/*", "tokenizer/*"]
            left_out += ["*.bin", "*.msgpack"]
        wanted += old_layout
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=left_out))
    except Exception as error:  # the client raises errors of many kinds without a common base
        raise FileNotFoundError(
            f"There is no local folder {name}, and it could not be fetched from the hub "
            f"({type(error).__name__}). Download it where there is a network and give the folder."
        ) from error


def _load_network(folder: Path, sidecar: dict[str, Any]) -> UNet | TextUNet:
    """The network with all its weights, and what belongs to it."""
    unet_folder = _component(folder, "unet", "config.json")
    class_name = _read_json(unet_folder / "config.json").get("_class_name")
    if class_name == "UNet2DConditionModel":
        codec = _load_codec(folder)
        return TextUNet(_load(UNet2DConditionModel, unet_folder), codec)
    classes, null_label = sidecar.get("num_classes"), sidecar.get("null_label")
    if class_name == MNISTUNet.__name__:
        return UNet.wrap(_load(MNISTUNet, unet_folder, use_safetensors=True), classes, null_label)
    if class_name != "UNet2DModel":
        raise ValueError(
            f"The network in {unet_folder} is a {class_name}; UNet2DModel and UNet2DConditionModel "
            "are what can be loaded."
        )
    unet = _load(UNet2DModel, unet_folder)
    if unet.config.out_channels != unet.config.in_channels:
        raise ValueError(
            f"The network in {unet_folder} has {unet.config.in_channels} channels of input and "
            f"{unet.config.out_channels} of output: one that learned its variance cannot be used."
        )
    conditions = _load_conditions(unet, folder)
    return UNet.wrap(unet, classes, null_label, conditions, sidecar.get("patch_size", 1))


def _load_codec(folder: Path) -> LatentCodec:
    """The frozen parts of a text-to-image folder."""
    from transformers import CLIPTextModel, CLIPTokenizer  # slow to import, and only needed here

    config = "config.json"
    parts = {"vae": config, "text_encoder": config, "tokenizer": "tokenizer_config.json"}
    for name, file in parts.items():
        if not (folder / name / file).is_file():
            raise ValueError(
                f"{folder} has no {name}/{file}: a text-to-image model needs {', '.join(parts)}. "
                "Give a whole folder of a StableDiffusionPipeline."
            )
    vae = _load(AutoencoderKL, folder / "vae", use_safetensors=True)
    try:
        with without_bars():
            loaded: Any = CLIPTextModel.from_pretrained(
                folder / "text_encoder",
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        text_encoder, report = loaded
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"The text encoder or the tokenizer in {folder} cannot be read ({error}). Export or "
            "download the folder again."
        ) from error
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise ValueError(
            f"The text encoder's weights in {folder} lack {', '.join(missing[:3])}: export or "
            "download the folder again."
        )
    unet = _read_json(_component(folder, "unet", config) / config)
    return LatentCodec(vae, text_encoder, tokenizer, unet["sample_size"])


def _load_conditions(unet: UNet2DModel | MNISTUNet, folder: Path) -> ConditionEmbedding | None:
    """What embeds the network's conditions, where its own class embedding does not.

    The folder's code, which stock diffusers would run, is never imported.
    """
    if unet.config.get("class_embed_type") != "identity":
        return None
    own = folder / "conditions"
    if not (own / "config.json").is_file():
        raise ValueError(
            f"{folder} has no conditions/config.json, which this network needs: what it is "
            "conditional on is embedded there. Export or download the folder again."
        )
    class_name = _read_json(own / "config.json").get("_class_name")
    if class_name != ConditionEmbedding.__name__:
        raise ValueError(
            f"The conditions in {own} are a {class_name}; ConditionEmbedding is what can be loaded."
        )
    conditions = _load(ConditionEmbedding, own, use_safetensors=True)
    width = unet.time_embedding.linear_2.out_features
    if conditions.config.width != width:
        raise ValueError(
            f"The conditions in {own} are of width {conditions.config.width}, and the network "
            f"takes {width}: they are of another network. Export or download the folder again."
        )
    return conditions


def _load(kind: type[ModelMixin], folder: Path, **options: Any) -> Any:
    """A component with all its weights."""
    try:
        model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"The network's weights in {folder} cannot be read ({error}). Export or download "
            "the folder again."
        ) from error
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"The network in {folder} does not fit its config.json ({error}). Export or download "
            "the folder again."
        ) from error
    if report["missing_keys"]:  # diffusers would go on with random numbers
        raise ValueError(
            f"The network's weights in {folder} lack {', '.join(report['missing_keys'][:3])}: "
            "export or download the folder again."
        )
    model.register_to_config(_name_or_path="")  # else later exports would tell this folder's path
    return model


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
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged (it holds no object). Export the folder again.")
    return content


def _from_sidecar(network: UNet | TextUNet, sidecar: dict[str, Any], file: Path) -> NetworkDenoiser:
    """Build what ``lit_distill.json`` describes."""
    if sidecar.get("format") != FORMAT:
        raise ValueError(
            f"{file} has the format {sidecar.get('format')!r}, and this version of lit_distill "
            f"reads {FORMAT}: update it, or export the folder again."
        )
    if sidecar.get("steps") is not None:  # of before few_steps; it would pass for a teacher
        raise ValueError(
            f"{file} is a student's of an early version, which does not say how it is sampled: "
            "export the folder again."
        )
    name = sidecar.get("denoiser")
    if name not in _CLASSES:
        raise ValueError(f"{file} names the denoiser {name!r}; known are {', '.join(_CLASSES)}.")
    try:
        denoiser = _CLASSES[name](network, **sidecar.get("settings", {}))
        few_steps = sidecar.get("few_steps")
        denoiser.few_steps = None if few_steps is None else FewSteps(**few_steps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is no description of a {name} ({error}).") from error
    return denoiser


def _from_scheduler(network: UNet | TextUNet, folder: Path) -> NetworkDenoiser:
    """Build what a foreign scheduler's configuration describes."""
    scheduler = _scheduler(folder)
    config, name = scheduler.config, type(scheduler).__name__
    if any(config.get(key) for key in ("clip_sample", "clip_denoised", "thresholding")):
        warnings.warn(
            f"The scheduler in {folder} clips its estimates of x0. Here they are not clipped, so "
            "that samples differ slightly from that pipeline's.",
            stacklevel=3,
        )
    levels = {k: config[k] for k in ("sigma_min", "sigma_max", "sigma_data") if k in config}
    if name == "FlowMatchEulerDiscreteScheduler":
        _expect(scheduler, folder, "num_train_timesteps", 1000)
        return FlowDenoiser(network)
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        _expect(scheduler, folder, "prediction_type", "epsilon")
        return EDMDenoiser(network, **levels, time_scale=1.0)
    if name == "CMStochasticIterativeScheduler":
        model = ConsistencyDenoiser(network, **levels, num_timesteps=config.num_train_timesteps)
        model.few_steps = FewSteps(trained=(1, 2), gamma=1.0)
        return model
    if not hasattr(scheduler, "betas") or not hasattr(scheduler, "alphas_cumprod"):
        raise _unknown(name, folder)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _TABLE_CLASSES:
        raise ValueError(
            f"The scheduler in {folder} says prediction_type={prediction!r}; "
            f"{', '.join(_TABLE_CLASSES)} are known."
        )
    if name == "LCMScheduler":
        student = LatentConsistencyDenoiser(
            network,
            betas=scheduler.betas,
            prediction=prediction,
            grid_steps=config.original_inference_steps,
            time_scaling=config.timestep_scaling,
        )
        student.few_steps = FewSteps(trained=(4, 1, 2, 8), gamma=1.0)
        return student
    return _TABLE_CLASSES[prediction](network, betas=scheduler.betas)


def _scheduler(folder: Path) -> Any:
    """The scheduler in a folder, with defaults for what its configuration leaves out."""
    config = _read_json(folder / "scheduler_config.json")
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not known:
        raise _unknown(config.get("_class_name"), folder)
    return kind.from_config(config)


def _unknown(name: Any, folder: Path) -> ValueError:
    return ValueError(
        f"The scheduler {name or '(none)'} in {folder} is none that says what the network "
        "predicts; DDPM, DDIM, EDM, consistency and flow-matching schedulers do."
    )


def _expect(scheduler: Any, folder: Path, key: str, value: Any) -> None:
    """Refuse a network that is asked otherwise than its denoiser would."""
    if scheduler.config.get(key, value) != value:
        raise ValueError(
            f"The {type(scheduler).__name__} in {folder} says {key}={scheduler.config[key]!r}; "
            f"{value!r} is what can be loaded."
        )
