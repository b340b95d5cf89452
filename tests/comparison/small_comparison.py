"""A comparison that trains in seconds: a tiny teacher of digits and methods of a few updates."""

from pathlib import Path

import yaml
from small_teacher import export

METHOD = """\
seed_everything: 0
trainer:
  default_root_dir: runs/digits/{name}
  accelerator: cpu
  max_steps: 8
  max_epochs: -1
  check_val_every_n_epoch: null
  val_check_interval: 8
  log_every_n_steps: 1
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{filename: last, every_n_train_steps: 2}}
    - class_path: lit_distill.callbacks.ExportPipeline
model:
  class_path: lit_distill.methods.{method}
  init_args:
    teacher: {teacher}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.001}}}}
    lr_scheduler:
      class_path: torch.optim.lr_scheduler.OneCycleLR
      init_args: {{max_lr: 0.001, total_steps: "${{trainer.max_steps}}"}}
    {options}
data:
  class_path: lit_distill.datamodules.DigitsDataModule
  init_args: {{batch_size: 16}}
"""
METHODS = {
    "cd": ("ConsistencyDistillation", "teacher", "{num_nodes: 4, distance: l2}"),
    "sfd": ("SFD", "teacher", "{steps: 2, teacher_substeps: 1, distance: l1}"),
    "second": ("KnowledgeDistillation", "sfd", "{online: true, teacher_steps: 2, distance: l2}"),
    "broken": ("ConsistencyDistillation", "teacher", "{num_nodes: 1, distance: l2}"),
}


def write_comparison(folder: Path, *names: str, **settings: object) -> Path:
    """Write a teacher, the configurations of methods, and ``compare.yaml`` of the named ones."""
    export(folder / "small")
    configs = folder / "configs"
    configs.mkdir()
    for name, (method, teacher, options) in METHODS.items():
        filled = METHOD.format(
            name=name, method=method, teacher=f"runs/digits/{teacher}/pipeline", options="OPTIONS"
        )
        given = yaml.safe_load(filled.replace("    OPTIONS\n", ""))
        given["model"]["init_args"].update(yaml.safe_load(options))
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(given))
    comparison = {
        "folder": str(folder / "compared"),
        "teacher": str(folder / "small"),
        "budget": "4 updates",
        "tuning": "none",
        "evaluation": {
            "data": "lit_distill.datamodules.DigitsDataModule",
            "extractor": "lit_distill.metrics.DigitsExtractor",
            "num_images": 60,
            "batch_size": 60,
            "precision": "32-true",
            "accelerator": "cpu",
            "teacher_steps": 2,
            "teacher_nfe": [1],
            "resamples": 4,
        },
        "entries": [
            {"config": str(configs / f"{name}.yaml"), "label": name.upper(), "family": "all"}
            for name in names
        ],
        **settings,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(comparison))
    return path
