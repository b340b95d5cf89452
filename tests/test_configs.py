"""Every file under configs/ runs: parsed, and two steps of a small network on generated data.

Those in configs/data/ hold the data alone: each is laid over the config of a method.
"""

import io
import json
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from ended import Command
from PIL import Image
from small_text import text_folder
from torch import nn

from lit_distill.diffusion import EDMDenoiser, EpsilonDenoiser, NetworkDenoiser
from lit_distill.losses import DISTANCES, LPIPS
from lit_distill.metrics import extractors
from lit_distill.models import MNISTUNet, UNet, load_denoiser, save_denoiser

CONFIGS = Path(__file__).parents[1] / "configs"
DATA = sorted(CONFIGS.glob("data/*.yaml"))
FILES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.glob("*/*.yaml")
    if path not in DATA
    and path.parent.name != "compare"  # no runs: see tests/comparison/test_plan.py
)
SHAPES = {
    "digits": (1, 8),
    "mnist": (1, 28),
    "cifar10": (3, 32),
    "celeba": (3, 32),
    "plane": (2, 1),
}

ON_CPU = ("--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
FEW_STEPS = (
    *("--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false"),
    *("--data.init_args.batch_size", "2"),
)
FEW_PAIRS = ("--data.init_args.predict_samples", 8, "--data.init_args.predict_batch_size", 4)
NETWORK = "--model.init_args.{}.init_args.network.init_args"
# What a number in the file makes slow, and no other option would show.
CHEAPER: dict[str, tuple[object, ...]] = {
    "captions/autoencoder.yaml": (
        *("--model.init_args.pipeline.vae_widths", "[8,16,16]"),
        *("--model.init_args.pipeline.unet_widths", "[16,16]"),
    ),
    "coco/sfd.yaml": ("--model.init_args.accumulate", 1),
    "cifar10/pd.yaml": ("--model.init_args.teacher_steps", 4, "--model.init_args.updates", "[1,5]"),
    # Whose teacher is sampled for the first and the last picture.
    **{
        file: ("--model.init_args.steps", 2)
        for file in FILES
        if Path(file).stem in ("flow", "teacher", "teacher_original", "teacher_small")
        or "pairs" in file
    },
}

Run = Callable[[str], None]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data sets, with noise for images."""
    root = tmp_path_factory.mktemp("data")
    write_mnist(root / "mnist" / "MNIST" / "raw", 100)
    for name in ("cifar10", "celeba"):
        (root / name).mkdir()
    write_zip(root / "celeba" / "img_align_celeba.zip", 20)
    write_zip(root / "own.zip", 20)
    for split in ("train", "test"):
        write_zip(root / "cifar10" / f"cifar10-32x32-{split}.zip", 100)
    return root


def write_mnist(raw: Path, count: int) -> None:
    """MNIST's four files."""
    generator = torch.Generator().manual_seed(0)
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.numpy().tobytes())
        head = struct.pack(">II", 2049, count)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.numpy().tobytes())


def write_zip(path: Path, count: int) -> None:
    """Images of 32x32 pixels and 10 classes in EDM's format."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(pixels.numpy()):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            archive.writestr(f"{i:05d}.png", buffer.getvalue())
        labels = [[f"{i:05d}.png", i % 10] for i in range(count)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


@pytest.fixture(scope="session")
def inception() -> dict[str, torch.Tensor]:
    """The network of the FID with random weights."""
    from torch_fidelity import feature_extractor_inceptionv3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: 0)
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3("x", ["2048"])
    return network.state_dict()


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache with a small ``google/ddpm-cifar10-32``."""
    root = tmp_path_factory.mktemp("hub")
    cached = root / "models--google--ddpm-cifar10-32"
    network = UNet(32, 3, None, [8], layers_per_block=1, norm_num_groups=4)
    DDPMPipeline(network.unet, DDPMScheduler()).save_pretrained(cached / "snapshots" / "0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    return root


@pytest.fixture(autouse=True)
def nothing_is_downloaded(
    images: Path,
    vgg: Path,
    inception: dict[str, torch.Tensor],
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Data and weights that users fetch; LPIPS looks at less than 224 pixels a side."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("LIT_DISTILL_DATA", str(images))
    monkeypatch.setitem(DISTANCES, "lpips", partial(LPIPS, resize=32, weights=vgg))
    monkeypatch.setattr(extractors, "load_state_dict_from_url", lambda *_, **__: inception)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run left for the next, by ``<data set>/<run>``."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def run(command: Command, shelf: Path, vgg: Path) -> Run:
    """``run("digits/cd.yaml")``: that file in the current folder, after those that it needs."""

    def run_file(file: str, *more: object) -> None:
        dataset, text = Path(file).parent.name, (CONFIGS / file).read_text()
        for name in needed(file):
            provide(f"{dataset}/{name}")
        if dataset == "coco":
            more = (*more, *small_coco(text, shelf))
        options = (*ON_CPU, *CHEAPER.get(file, ()), *more)
        if "PairWriter" in text:
            ended = command("predict", "--config", CONFIGS / file, *options, *FEW_PAIRS)
        else:
            if "MNISTUNet" in text:
                options = (*options, f"{NETWORK.format('denoiser')}.unet.init_args.n_feat", 8)
            elif "network:" in text and dataset != "plane":
                options = (
                    *options,
                    *small_network("denoiser" if "denoiser:" in text else "student"),
                )
            if "losses.LPIPS" in text:
                option = "--model.init_args.distance.init_args"
                options = (*options, f"{option}.weights", vgg, f"{option}.resize", 32)
            ended = command("fit", "--config", CONFIGS / file, *options, *FEW_STEPS)
        assert ended.status == 0, ended.err

    def provide(name: str) -> None:
        """Make what another run leaves, or take it from the shelf."""
        if not (shelf / name).exists():
            if name == "captions/teacher":
                text_folder(Path("runs/captions/teacher/pipeline"), image_size=16)
            elif "/teacher" in name:
                write_teacher(name)
            else:
                run_file(f"{name}.yaml")
            shutil.copytree(Path("runs") / name, shelf / name)
        shutil.copytree(shelf / name, Path("runs") / name, dirs_exist_ok=True)

    return run_file


def small_coco(text: str, shelf: Path) -> tuple[object, ...]:
    """A small text-to-image model and captioned noise in the place of Stable Diffusion and COCO."""
    teacher = shelf / "sd"
    if not teacher.exists():  # once, as two tokenizers of the same words may differ
        text_folder(teacher, channels=3)
    Path("coco").mkdir(exist_ok=True)
    lines = []
    for i in range(8):
        Image.effect_noise((20, 16), 50).convert("RGB").save(f"coco/{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"caption {i}"}))
    Path("coco/metadata.jsonl").write_text("\n".join(lines))
    model = "denoiser" if "denoiser:" in text else "teacher"
    data = "data.init_args.data" if "PairsDataModule" in text else "data"
    options = (f"--model.init_args.{model}", teacher)
    options = (*options, f"--{data}.init_args.source.init_args.folder", "coco")
    if "accumulate_grad_batches" in text:
        options = (*options, "--trainer.accumulate_grad_batches", "2")
    return options


def small_network(option: str) -> tuple[str, ...]:
    """The network that an option holds, made smaller."""
    name = NETWORK.format(option)
    return (
        *(f"{name}.block_out_channels", "[8]", f"{name}.layers_per_block", "1"),
        *(f"{name}.norm_num_groups", "4", f"{name}.attention_levels", "[]"),
    )


def needed(file: str) -> list[str]:
    """The runs of the same data that a file reads from."""
    dataset, own = Path(file).parent.name, Path(file).stem
    found = re.findall(rf"runs/{dataset}/(\w+)", (CONFIGS / file).read_text())
    return sorted({*found} - {own, "latents", "prompts"})  # which the data module computes itself


def write_teacher(name: str) -> None:
    dataset = name.split("/")[0]
    channels, size = SHAPES[dataset]
    classes = None if dataset in ("celeba", "plane") else 10
    # Two levels, whose features adversarial methods take by their layers' names; a point has one.
    widths = [8] if dataset == "plane" else [8, 8]
    network = UNet(size, channels, classes, widths, layers_per_block=1, norm_num_groups=4)
    denoiser: NetworkDenoiser = EDMDenoiser(network)
    if name == "mnist/teacher_original":
        denoiser = EpsilonDenoiser(
            UNet.wrap(MNISTUNet(n_feat=8), num_classes=10, null_label=10), image_range=(0, 1)
        )
    save_denoiser(denoiser, f"runs/{name}/pipeline")


@pytest.mark.parametrize("file", DATA, ids=lambda path: path.stem)
def test_data_config_swaps_the_data_of_a_method(file: Path, images: Path, command: Command) -> None:
    shapes = {"celeba": (3, 64, None), "folder": (3, 32, 10)}
    channels, size, classes = shapes.get(file.stem) or (*SHAPES[file.stem], 10)
    network = UNet(size, channels, classes, [8], layers_per_block=1, norm_num_groups=4)
    save_denoiser(EDMDenoiser(network), "teacher")
    configs = ("--config", CONFIGS / "digits" / "cd.yaml", "--config", file)
    more = ("--data.init_args.root", images / "own.zip") if file.stem == "folder" else ()
    ended = command(
        "fit", *configs, "--model.init_args.teacher=teacher", *ON_CPU, *FEW_STEPS, *more
    )
    assert ended.status == 0, ended.err
    assert load_denoiser("runs/digits/cd/pipeline").image_shape == (channels, size, size)
    if file.stem in ("cifar10", "celeba", "folder"):
        assert list(Path("runs/cache").glob(f"*-train-{size}x{channels}-*/images.npy"))


@pytest.mark.parametrize("file", FILES)
def test_config_runs_two_steps(file: str, run: Run) -> None:
    run(file)
    folder = Path("runs") / file.removesuffix(".yaml")
    if "PairWriter" in (CONFIGS / file).read_text():
        assert len(list(folder.glob("shard-*.safetensors"))) == 2
    else:
        assert (folder / "pipeline" / "model_index.json").is_file()
        pictures = list((folder / "samples").glob("*.png"))
        assert bool(pictures) is ("SampleGrid" in (CONFIGS / file).read_text())


@pytest.mark.parametrize("file", FILES)
def test_the_last_checkpoint_is_of_the_last_step(file: str) -> None:
    """Or a test would take other weights than those that were exported."""
    config = yaml.safe_load((CONFIGS / file).read_text())
    model = config["model"]["init_args"]
    # SFD's batch is as many updates as the student has steps, and is looked at as a whole.
    several = config["model"]["class_path"].endswith(".SFD") and isinstance(model["steps"], int)
    updates = model["steps"] if several else 1
    for callback in config["trainer"].get("callbacks", []):
        every = callback.get("init_args", {}).get("every_n_train_steps")
        if every is not None:
            assert every % updates == 0 == config["trainer"]["max_steps"] % every


def test_every_data_set_has_its_stages() -> None:
    """Each a teacher and its pairs; the digits and CIFAR10 have all methods."""
    found = {
        dataset: {Path(file).stem for file in FILES if file.startswith(dataset)}
        for dataset in (*SHAPES, "captions", "coco")
    }
    assert sum(map(len, found.values())) == len(FILES)
    ode = {"kd", "pd", "td", "sfd", "sfd_v", "sfd_stage2", "cd", "ct", "multi_boundary", "ctm"}
    own = {"teacher", "pairs", "dmd"}
    original = {"dmd_original", "pairs_original"}
    small = {"teacher_small", "pairs_small", "dmd_small", "sfd_small", "cd_small"}
    small |= {"pairs_guided_small", "kd_small", "dmd2_small", "sfd2_small"}
    assert found["mnist"] == own | original | small | {"teacher_original"}
    assert found["celeba"] == own | {"dmd_original"}
    assert found["cifar10"] >= original
    flows = {"flow", "flow_pairs", "reflow", "flow_distillation", "mean_flow"}
    both = {"teacher", "pairs", *ode, *flows, "dmd", "dmd2", "sid", "ladd"}
    assert found["digits"] >= both | {"trajectories", "sfd_stored", "ct_scratch"}
    assert found["cifar10"] >= both
    text_to_image = {"lcm", "lcm_lora", "multi_boundary", "dmd", "sfd"}
    text_to_image |= {"pairs", "reflow", "instaflow"}
    assert found["coco"] == text_to_image
    assert found["captions"] == text_to_image | {"autoencoder", "teacher"}
    for file in FILES:
        for name in needed(file):
            made_by = f"{Path(file).parent.name}/{name}.yaml"
            assert made_by in FILES, f"{file} reads what {made_by} would make"
