"""The three original experiments on real images: pairs, training and test, a few steps each.

The networks have their real sizes and random weights, and LPIPS's backbone is random: neither can
be fetched here. Where Inception is what a config names, the local CIFAR-10 classifier looks.
"""

import json
import os
from pathlib import Path

import pytest
import yaml
from ended import Command
from public import ddpm_cifar10

from lit_distill.diffusion import EpsilonDenoiser, linear_betas
from lit_distill.models import MNISTUNet, UNet, save_denoiser

CONFIGS = Path(__file__).parents[1] / "configs"


def mnist() -> EpsilonDenoiser:
    """The conditional network of public checkpoints."""
    network = UNet.wrap(MNISTUNet(), num_classes=10, null_label=10)
    return EpsilonDenoiser(network, linear_betas(400, 1e-4, 2e-2), image_range=(0, 1))


def celeba() -> EpsilonDenoiser:
    """The preset of ``configs/celeba/teacher.yaml``."""
    network = UNet(32, 3, None, [16, 32, 48], layers_per_block=1, norm_num_groups=8)
    return EpsilonDenoiser(network, linear_betas(1000, 1e-4, 1e-2))


def cifar10() -> EpsilonDenoiser:
    """``google/ddpm-cifar10-32``."""
    return EpsilonDenoiser(UNet.wrap(ddpm_cifar10()), linear_betas(1000, 1e-4, 2e-2))


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.skipif("LIT_DISTILL_DATA" not in os.environ, reason="LIT_DISTILL_DATA is not set")
@pytest.mark.parametrize(
    ("teacher", "parameters", "pairs"),
    [(mnist, 6_585_601, "pairs_original"), (celeba, 425_859, "pairs"), (cifar10, 35_746_307, "")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_original_experiment_runs_on_real_images(
    teacher, parameters: int, pairs: str, command: Command, vgg: Path
) -> None:
    dataset = teacher.__name__
    denoiser = teacher()
    assert sum(p.numel() for p in denoiser.parameters()) == parameters
    save_denoiser(denoiser, "teacher")
    seen = "MNISTExtractor" if dataset == "mnist" else "ResNet56Extractor"
    evaluation = {
        "class_path": "lit_distill.callbacks.Evaluation",
        "init_args": {
            "extractor": f"lit_distill.metrics.{seen}",
            **{"num_samples": 40, "batch_size": 20, "teacher_steps": 2, "teacher_solver": "euler"},
            **{"validation_samples": 0, "resamples": 0},
        },
    }
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"filename": "last", "every_n_train_steps": 2},
    }
    distance = {
        "class_path": "lit_distill.losses.LPIPS",
        "init_args": {"net": "vgg", "resize": 64, "weights": str(vgg)},
    }
    less = {
        "trainer": {
            **{"accelerator": "cpu", "precision": "32-true", "max_steps": 2},
            **{"enable_progress_bar": False, "limit_val_batches": 0},
            "callbacks": [checkpoint, evaluation],
        },
        "model": {"init_args": {"teacher": "teacher", "distance": distance}},
        "data": {"init_args": {"batch_size": 4}},
    }
    Path("less.yaml").write_text(yaml.safe_dump(less))
    folder = CONFIGS / dataset
    ended = command(
        *("predict", "--config", folder / f"{pairs or 'pairs_original'}.yaml"),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
        *("--model.init_args.denoiser", "teacher", "--model.init_args.steps", 2),
        *("--data.init_args.predict_samples", 8, "--data.init_args.predict_batch_size", 4),
    )
    assert ended.status == 0, ended.err
    configs = ("--config", folder / "dmd_original.yaml", "--config", "less.yaml")
    for verb in ("fit", "test"):
        ended = command(verb, *configs)
        assert ended.status == 0, ended.err
    rows = json.loads((Path("runs") / dataset / "dmd_original" / "metrics.json").read_text())
    student = next(row for row in rows if row["method"] == "DMD")
    name = seen.removesuffix("Extractor").lower()
    assert student["student_updates"] == 2 and student["nfe"] == 1
    assert student[f"fd_teacher_{name}"] > 0 and student[f"fd_{name}"] > 0
    # Real images are told from noise: those of training are nearer to those held out.
    real = next(row for row in rows if row["method"] == "real training")
    assert real[f"fd_{name}"] < student[f"fd_{name}"]
