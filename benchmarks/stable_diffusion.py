"""What training on Stable Diffusion 1.5 would need, counted without weights and without a GPU.

    python benchmarks/stable_diffusion.py

Its networks stand on torch's meta device, which knows shapes only. Counted are weights, those of
the adapters, floating-point operations of a pass, and the bytes that a pass of one 512x512 image
keeps for the backward one in bfloat16. Attention matrices, which the meta device keeps and the
fused kernels of GPUs do not, are left out; workspace and fragmentation come on top. Last, what
follows for the recipes in configs/coco: memory of a GPU, and hours if it does 100 TFLOP/s.
"""

import lit_distill  # noqa: F401  # isort: skip  # before diffusers: see lit_distill/_torchvision_ops.py

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

SPEED = 100.0  # TFLOP/s, a third of an A100's bfloat16 peak: an assumption
TOKENS = 77
LCM_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
]
DMD_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


class Recipe(NamedTuple):
    """A file in configs/coco.

    Attributes:
        images: Batch times updates, or pairs.
        passes: Passes of the U-Net for each of them; a backward pass counts two.
        micro_batch: Images of a pass that is kept for the backward one, on one GPU.
        copies: Of the weights in float32: as many as the method holds, gradients and Adam's two.
        adapter: Layers of the adapters, where the weights are not trained themselves.
        adapters: How many.
        lpips: Whether images are decoded and compared.
    """

    images: int
    passes: int
    micro_batch: int
    copies: int
    adapter: list[str] | None = None
    adapters: int = 0
    lpips: bool = False


RECIPES = {
    # student 3, guided teacher 2, target 1; beside its gradients and Adam's states the student's
    # target and average, and the teacher
    "lcm": Recipe(64 * 5_000, 6, 16, 7),
    "lcm_lora": Recipe(64 * 5_000, 6, 8, 1, LCM_LAYERS, 1),
    "multi_boundary": Recipe(64 * 5_000, 6, 16, 6),
    # student 3, guided real score 2, fake score 1; five updates of it, four on fresh samples
    "dmd": Recipe(16 * 5_000, 6 + 5 * 3 + 4, 8, 1, DMD_LAYERS, 2),
    "sfd": Recipe(128 * 1_563, 4 * (3 + 4), 16, 6),
    "pairs": Recipe(100_000, 25 * 2, 0, 2),
    "reflow": Recipe(64 * 70_000, 3, 8, 6),
    "instaflow": Recipe(1_024 * 18_000, 3, 4, 6, lpips=True),
}


def empty(*shape: int, learned: bool = False) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=learned)


def unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return model.to(torch.bfloat16)


def vae() -> AutoencoderKL:
    with torch.device("meta"):
        model = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
    return model.to(torch.bfloat16).requires_grad_(False)


def vgg() -> nn.Module:
    with torch.device("meta"):
        return vgg16().features.to(torch.bfloat16).requires_grad_(False)


def denoise(model: nn.Module) -> None:
    model(empty(1, 4, 64, 64), torch.empty(1, device="meta"), empty(1, TOKENS, 768))


def tera_operations(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def kept(run: Callable[[], object], model: nn.Module) -> float:
    """Gigabytes that a pass keeps for the backward one, but for weights."""
    sizes: dict[int, int] = {}
    left_out = {p.untyped_storage()._cdata for p in model.parameters()}
    alive: list[Tensor] = []  # or another tensor may take its place

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        if tensor.ndim == 3 and tensor.shape[2] in (tensor.shape[1], TOKENS):  # attention
            left_out.add(storage._cdata)
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(size for key, size in sizes.items() if key not in left_out) / 1e9


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def with_adapter(rank: int, layers: list[str]) -> tuple[nn.Module, int]:
    """The U-Net with an adapter, and how many weights that has."""
    model = unet()
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=layers), model)
    own = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)
    return model.to(torch.bfloat16), sum(p.numel() for p in own.values())


def main() -> None:
    """Count, and print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    model, decoder, backbone = unet(), vae(), vgg()
    latents, pixels = empty(1, 4, 64, 64, learned=True), empty(1, 3, 224, 224, learned=True)
    works = {
        "U-Net": (model, lambda: denoise(model)),
        "decoder": (decoder, lambda: decoder.decode(latents)),
        "VGG at 224": (backbone, lambda: backbone(pixels)),
    }
    counted = {name: (tera_operations(run), kept(run, part)) for name, (part, run) in works.items()}
    for name, (operations, gigabytes) in counted.items():
        print(f"{name}: {operations:.3f} TFLOP a pass, keeps {gigabytes:.2f} GB an image")
    (unet_work, unet_kept), (decoder_work, decoder_kept), (vgg_work, vgg_kept) = counted.values()
    size = weights(model)
    print(f"U-Net: {size:,} weights")
    print("\n| recipe | memory of a GPU | hours of one A100 |\n|---|---|---|")
    for name, recipe in RECIPES.items():
        gigabytes, work, image = 4e-9 * size * recipe.copies, recipe.passes * unet_work, unet_kept
        if recipe.adapter is not None:
            adapted, own = with_adapter(64, recipe.adapter)
            image = kept(lambda adapted=adapted: denoise(adapted), adapted)  # type: ignore[misc]
            gigabytes += 5 * 4e-9 * own * recipe.adapters  # gradient, Adam's two, average
        elif recipe.micro_batch > 0:
            gigabytes += 2e-9 * size  # autocast's bfloat16 copy
        if recipe.lpips:  # the target's pass, the student's, and back through frozen weights
            image += decoder_kept + vgg_kept
            work += 3 * (decoder_work + vgg_work)
        gigabytes += recipe.micro_batch * image
        hours = recipe.images * work / SPEED / 3600
        print(f"| {name} | {gigabytes:.0f} GB | {hours:.1f} |")


if __name__ == "__main__":
    main()
