"""Every file under configs/ runs: parsed, and two steps of a small network on generated data."""

import struct
from pathlib import Path

import pytest
import torch
from ended import Command
from torchvision.models import vgg16

from lit_distill.diffusion import EDMDenoiser
from lit_distill.models import UNet, save_denoiser

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml"))
SHAPES = {"digits": (1, 8), "mnist": (1, 28)}
FEW_STEPS = (
    *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
    *("--trainer.enable_progress_bar", "false", "--data.init_args.batch_size", "2"),
)
NETWORK = "--model.init_args.denoiser.init_args.network.init_args"
SMALL_NETWORK = (
    *(f"{NETWORK}.block_out_channels", "[8,8]", f"{NETWORK}.layers_per_block", "1"),
    *(f"{NETWORK}.norm_num_groups", "4", f"{NETWORK}.attention_levels", "[]"),
)


def write_images(root: Path, count: int) -> None:
    """MNIST's four files with noise for images."""
    generator = torch.Generator().manual_seed(0)
    raw = root / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.numpy().tobytes())
        head = struct.pack(">II", 2049, count)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.numpy().tobytes())


def write_teacher(dataset: str) -> None:
    channels, size = SHAPES[dataset]
    network = UNet(size, channels, 10, [8, 8], layers_per_block=1, norm_num_groups=4)
    save_denoiser(EDMDenoiser(network), f"runs/{dataset}/teacher/pipeline")


def write_pairs(command: Command, dataset: str) -> None:
    """By the pairs' own configuration."""
    ended = command(
        *("predict", "--config", CONFIGS / dataset / "pairs.yaml"),
        *("--data.init_args.predict_samples", 8, "--data.init_args.predict_batch_size", 4),
        *("--model.init_args.steps", 2, "--trainer.accelerator", "cpu"),
    )
    assert ended.status == 0, ended.err
    assert len(list(Path(f"runs/{dataset}/pairs").glob("shard-*.safetensors"))) == 2


@pytest.mark.parametrize("file", FILES)
def test_config_runs_two_steps(
    file: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, method = Path(file).parent.name, Path(file).stem
    write_images(tmp_path, 100)
    monkeypatch.setenv("LIT_DISTILL_DATA", str(tmp_path))
    options: tuple[object, ...] = FEW_STEPS
    if method == "teacher":
        options = (*FEW_STEPS, *SMALL_NETWORK)
    else:
        write_teacher(dataset)
        write_pairs(command, dataset)
    if method == "pairs":
        return
    if "LPIPS" in (CONFIGS / file).read_text():
        torch.save(vgg16(weights=None).state_dict(), tmp_path / "vgg16.pth")
        option = "--model.init_args.distance.init_args"
        options = (*options, f"{option}.weights", "vgg16.pth", f"{option}.resize", 32)
    ended = command("fit", "--config", CONFIGS / file, *options)
    assert ended.status == 0, ended.err
    run = Path("runs") / dataset / method
    assert (run / "pipeline" / "model_index.json").is_file()
    assert list((run / "samples").glob("*.png"))


def test_every_data_set_has_its_stages() -> None:
    assert {f"{d}/{m}.yaml" for d in SHAPES for m in ("teacher", "pairs", "dmd")} <= set(FILES)
