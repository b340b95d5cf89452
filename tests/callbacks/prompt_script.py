"""Run as a script it tests a text-to-image model on two processes, for its test."""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
from tiny import trainer

from lit_distill.callbacks import PromptEvaluation
from lit_distill.datamodules import CaptionedDigits, LatentTextDataModule
from lit_distill.methods import LatentConsistencyDistillation
from lit_distill.metrics import ClipScore, DigitsExtractor


def evaluate(pipeline: str, clip: str, folder: Path, devices: int) -> None:
    """Three batches of ten, ten and four images; of real ones likewise."""
    data = LatentTextDataModule(CaptionedDigits(), pipeline, str(folder / "cache"), batch_size=4)
    callback = PromptEvaluation(
        DigitsExtractor(scale=2),
        source=CaptionedDigits(),
        clip_score=ClipScore(clip),
        num_samples=24,
        batch_size=10,
        steps=(2,),
        teacher_steps=3,
        teacher_guidance=2.0,
    )
    options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    module = LatentConsistencyDistillation(pipeline, guidance=(1.5, 3.0))
    trainer(folder, callback, **options).test(module, data, verbose=False)


if __name__ == "__main__":
    evaluate(sys.argv[1], sys.argv[2], Path(sys.argv[3]), 2)
