"""The table and the picture of a text-to-image test, on an untrained model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
from small_text import text_folder
from tiny import trainer

from lit_distill.callbacks import PromptEvaluation
from lit_distill.datamodules import CaptionedDigits, LatentTextDataModule
from lit_distill.methods import DiffusionTeacher, LatentConsistencyDistillation, Reflow
from lit_distill.metrics import DigitsExtractor

PROMPTS = ["zero", "one", "two", "three"]
OPTIONS = {"num_samples": 24, "batch_size": 10, "teacher_steps": 3, "teacher_guidance": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("text") / "teacher")


def evaluated(module, folder, tmp_path, **options):
    data = LatentTextDataModule(CaptionedDigits(), folder, str(tmp_path / "cache"), batch_size=4)
    callback = PromptEvaluation(DigitsExtractor(scale=2), PROMPTS, **{**OPTIONS, **options})
    trainer(tmp_path, callback).test(module, data, verbose=False)
    return callback.rows


def test_a_row_for_the_teacher_and_for_each_number_of_steps(folder, tmp_path, capsys):
    module = LatentConsistencyDistillation(folder, guidance=(1.5, 3.0))
    rows = evaluated(module, folder, tmp_path, steps=(2, 1))
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(rows))
    assert [row["method"] for row in rows] == ["teacher", *["LatentConsistencyDistillation"] * 2]
    assert [row["nfe"] for row in rows] == [6, 2, 1]  # guidance counts two
    assert all(0 <= row["label_accuracy"] <= 1 for row in rows)
    assert rows[0]["paired_distance"] == 0 < rows[1]["paired_distance"]
    assert "LatentConsistencyDistillation" in capsys.readouterr().out
    picture = Image.open(tmp_path / "comparison.png")
    assert picture.width > 500 and picture.height > 200


def test_the_student_is_sampled_at_the_guidance_that_is_asked_for(folder, tmp_path):
    module = LatentConsistencyDistillation(folder, guidance=(1.5, 3.0))
    unet = module.network.network.unet
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    found = [evaluated(module, folder, tmp_path, steps=(1,), guidance=g)[1] for g in (1.5, 3.0)]
    assert [row["nfe"] for row in found] == [1, 1]  # it is told the scale
    assert found[0]["paired_distance"] != found[1]["paired_distance"]


def test_a_module_with_a_solver_is_sampled_by_it(folder, tmp_path):
    rows = evaluated(Reflow(folder), folder, tmp_path, steps=(2,))
    assert [row["solver"] for row in rows] == ["ddim", "euler"]
    assert [row["nfe"] for row in rows] == [6, 2]
    assert [row["student_updates"] for row in rows] == [None, 0]


def test_a_module_without_a_teacher_is_sampled_as_one(folder, tmp_path):
    rows = evaluated(DiffusionTeacher(folder), folder, tmp_path)
    assert [row["method"] for row in rows] == ["teacher"] and rows[0]["nfe"] == 6


def test_impossible_options_are_refused():
    extractor = DigitsExtractor(scale=2)
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptEvaluation(extractor, [])
    with pytest.raises(ValueError, match="1 labels are given for 4 prompts"):
        PromptEvaluation(extractor, PROMPTS, labels=[0])
