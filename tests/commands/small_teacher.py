"""A teacher that trains in a second, as a configuration file and as an exported folder."""

from pathlib import Path

import torch

from lit_distill.diffusion import Denoiser, EDMDenoiser, FewSteps
from lit_distill.models import UNet, save_denoiser

CONFIG = """\
model:
  class_path: lit_distill.methods.DiffusionTeacher
  init_args:
    denoiser:
      class_path: lit_distill.diffusion.EDMDenoiser
      init_args:
        network:
          class_path: lit_distill.models.UNet
          init_args:
            image_size: 8
            channels: 1
            num_classes: 10
            block_out_channels: [8]
            norm_num_groups: 4
            layers_per_block: 1
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.001}}
    lr_scheduler:
      class_path: torch.optim.lr_scheduler.CosineAnnealingLR
      init_args: {T_max: "${trainer.max_steps}"}
    steps: 2
data:
  class_path: lit_distill.datamodules.DigitsDataModule
  init_args: {batch_size: 64, predict_samples: 20, predict_batch_size: 10}
trainer:
  default_root_dir: runs/teacher
  accelerator: cpu
  max_steps: 3
  max_epochs: -1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""


def write_config(folder: Path) -> Path:
    """Write the configuration file."""
    path = folder / "teacher.yaml"
    path.write_text(CONFIG)
    return path


def export(folder: Path, *, classes: int | None = 10, few_steps: FewSteps | None = None) -> Path:
    """Write an untrained model as a folder; with ``few_steps`` it is a student."""
    torch.manual_seed(0)
    network = UNet(8, 1, classes, block_out_channels=[8], norm_num_groups=4, layers_per_block=1)
    denoiser: Denoiser = EDMDenoiser(network)
    denoiser.few_steps = few_steps
    save_denoiser(denoiser, folder)
    return folder
