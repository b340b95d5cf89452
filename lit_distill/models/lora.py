"""Low-rank adapters (Hu et al. 2022) of several networks on one frozen backbone, through peft.

Student, fake score and teacher are one network then: the teacher is the backbone as it is, the
others are the backbone with the tensors of their own adapter put in its place for the time of a
pass. No adapter is ever switched off between a pass and its gradient.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lit_distill.diffusion import Condition, Denoiser, NetworkDenoiser
from lit_distill.models.whole_folder import whole_folder

_OF_THE_BACKBONE = (
    "image_shape",
    "num_classes",
    "null_label",
    "inputs",
    "codec",
    "feature_layers",
)
_SLOT = "default"  # peft's name of the one adapter whose tensors change places
_BASE = "base_model.model."  # peft's prefix of an adapter's tensors in files


@dataclass(frozen=True)
class LoRA:
    """Settings of low-rank adapters.

    Attributes:
        rank: Rank of each layer's update.
        alpha: The update is scaled by ``alpha / rank``; the rank by default.
        target_modules: Ends of the names of the layers that are adapted; by default all
            convolutions and linear layers.

    Raises:
        ValueError: If the rank is no rank.
    """

    rank: int = 16
    alpha: int | None = None
    target_modules: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: an adapter has a rank of at least 1.")


class AdaptedNetwork(nn.Module):
    """A network with an adapter of its own on a backbone that it shares and does not own.

    Its parameters are the adapter's only; so are those of its copies.

    Args:
        backbone: A network prepared by :func:`adapted`.
        lora: Settings of the adapter.
    """

    def __init__(self, backbone: nn.Module, lora: LoRA) -> None:
        super().__init__()
        self._shared, self.lora = (backbone,), lora  # in a tuple it is no submodule
        self.adapter = nn.ParameterDict()
        for name, slot in backbone.named_parameters():
            if ".lora_" not in name:
                continue
            tensor = torch.zeros_like(slot, dtype=torch.float32)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
            self.adapter[name.replace(".", "/")] = nn.Parameter(tensor)

    @property
    def backbone(self) -> nn.Module:
        """The shared network."""
        return self._shared[0]

    def __getattr__(self, name: str) -> Any:
        """What a denoiser asks of its network is the backbone's, such as its image's shape."""
        if name in _OF_THE_BACKBONE:
            return getattr(self.backbone, name)
        return super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdaptedNetwork":
        """Another adapter with the same numbers, on the same backbone."""
        new = AdaptedNetwork.__new__(AdaptedNetwork)
        nn.Module.__init__(new)
        new._shared, new.lora = self._shared, self.lora
        new.adapter = copy.deepcopy(self.adapter, memo)
        return new.train(self.training)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by their names in the backbone."""
        return {name.replace("/", "."): tensor for name, tensor in self.adapter.items()}

    def forward(self, x: Tensor, time: Tensor, condition: Condition = None) -> Tensor:
        """Evaluate the backbone with this adapter."""
        x = x.to(next(self.backbone.parameters()).dtype)  # which may be rounded, unlike the adapter
        with _switched_on(self.backbone):
            return torch.func.functional_call(self.backbone, self.tensors(), (x, time, condition))

    def merged(self) -> nn.Module:
        """A plain network of its own, float32, with the adapter's update in its weights."""
        network = copy.deepcopy(self.backbone).float()
        network.load_state_dict(self.tensors(), strict=False)
        for name, layer in _adapter_layers(network):
            with _switched_on(network):
                layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, layer.get_base_layer())
        return network.train(self.training)


def adapted(denoiser: NetworkDenoiser, lora: LoRA) -> NetworkDenoiser:
    """A trainable copy of a denoiser that shares its network and adds an adapter to it.

    The denoiser itself goes on to be the frozen model without an adapter. At first the copy does
    what it does.

    Args:
        denoiser: The model; its network is prepared in place at the first call.
        lora: Settings of the adapter.

    Raises:
        ValueError: If no layer has one of the names.
    """
    network = denoiser.network
    if not _adapter_layers(network):
        denoiser.original = denoiser.original or denoiser.fingerprint()
        _prepare(network, lora)
    new = copy.deepcopy(denoiser, {id(network): AdaptedNetwork(network, lora)})
    new.original = None
    return new.requires_grad_(True)


def merged(denoiser: Denoiser) -> Denoiser:
    """The same model with a plain network, where it has an adapter."""
    network = getattr(denoiser, "network", None)
    if not isinstance(network, AdaptedNetwork):
        return denoiser
    return copy.deepcopy(denoiser, {id(network): network.merged()})


def save_adapter(denoiser: Denoiser, folder: str | Path) -> None:
    """Write a model's adapter in peft's format, whole or not at all.

    ``peft.PeftModel.from_pretrained(unet, folder)`` puts it on the teacher's ``unet``. That of a
    text-to-image model is loaded by ``pipe.load_lora_weights(folder)`` too.

    Args:
        denoiser: A model with an adapter.
        folder: Where to; an adapter that is there is replaced.

    Raises:
        ValueError: If it has no adapter, or something else is in the way.
    """
    from peft import LoraConfig

    network = getattr(denoiser, "network", None)
    if not isinstance(network, AdaptedNetwork):
        raise ValueError(f"This {type(denoiser).__name__} has no adapter (option lora).")
    target = Path(folder).absolute()
    if target.exists() and not (target / "adapter_config.json").is_file():
        raise ValueError(f"{target} exists and is no adapter's folder: name another folder.")
    state, layers = {}, set()
    for name, tensor in network.tensors().items():
        within = name.removeprefix("unet.")  # of the component that a pipeline has
        layers.add(within.partition(".lora_")[0])
        state[_BASE + within.replace(f".{_SLOT}.", ".")] = tensor.detach().cpu().contiguous()
    with whole_folder(target) as draft:
        safetensors.torch.save_file(state, draft / "adapter_model.safetensors")
        config = LoraConfig(
            r=network.lora.rank,
            lora_alpha=network.lora.alpha or network.lora.rank,
            target_modules=sorted(layers),
        )
        config.save_pretrained(str(draft))
        if getattr(network, "codec", None) is not None:
            _save_for_pipelines(state, config, draft)


def _save_for_pipelines(state: dict[str, Tensor], config: Any, folder: Path) -> None:
    """Write the file that ``pipe.load_lora_weights(folder)`` of a text-to-image pipeline reads."""
    from diffusers import StableDiffusionPipeline

    layers = {name.removeprefix(_BASE): tensor for name, tensor in state.items()}
    facts = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=facts
    )


def _prepare(network: nn.Module, lora: LoRA) -> None:
    """Put peft's layers into a network, switched off, for all adapters to come."""
    from peft import LoraConfig, inject_adapter_in_model

    fit = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    names = fit if lora.target_modules is None else list(lora.target_modules)
    found = [n for n in fit if any(n == name or n.endswith("." + name) for name in names)]
    if not found:
        kinds = sorted({n.rpartition(".")[2] for n in fit})
        raise ValueError(
            f"lora.target_modules={names} match no layer of this {type(network).__name__}; its "
            f"convolutions and linear layers are named {', '.join(kinds)}."
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,
        target_modules=found,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, network, _SLOT)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(False)
        if ".lora_" in name:
            parameter.data.zero_()  # nobody's: the weights stand for the frozen model alone
    for _, layer in _adapter_layers(network):
        layer.enable_adapters(False)


def _adapter_layers(network: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(n, m) for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)]


@contextmanager
def _switched_on(network: nn.Module) -> Iterator[None]:
    """Let the adapters' layers take part in a pass."""
    layers = [layer for _, layer in _adapter_layers(network)]
    for layer in layers:
        layer.enable_adapters(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(False)
