"""The table and the picture of a text-to-image test, on an untrained model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
sys.path.insert(0, str(Path(__file__).parents[1] / "metrics"))
from alone import run_script
from prompt_script import evaluate
from small_clip import by_hand, clip_folder
from small_text import text_folder
from tiny import trainer

from lit_distill.callbacks import PromptEvaluation, prompt_evaluation, prompted_images
from lit_distill.callbacks.report import format_table
from lit_distill.datamodules import (
    CaptionedDigits,
    CaptionedFolder,
    CaptionedImages,
    LatentTextDataModule,
)
from lit_distill.diffusion import GuidedDenoiser, sample, seeded_noise
from lit_distill.methods import DiffusionTeacher, LatentConsistencyDistillation, Reflow
from lit_distill.metrics import (
    ClipScore,
    DigitsExtractor,
    PixelExtractor,
    frechet_distance,
    to_uint8,
)
from lit_distill.models import load_denoiser

PROMPTS = ["zero", "one", "two", "three"]
OPTIONS = {"num_samples": 24, "batch_size": 10, "teacher_steps": 3, "teacher_guidance": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("text") / "teacher")


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
    """Latencies are not looked at here, and take most of the time."""
    monkeypatch.setattr("lit_distill.metrics.cost._median_seconds", lambda run, device: 1.0)


def evaluated(module, folder, tmp_path, **options):
    data = LatentTextDataModule(CaptionedDigits(), folder, str(tmp_path / "cache"), batch_size=4)
    asked = {} if "source" in options else {"prompts": PROMPTS}
    extractor = options.pop("extractor", DigitsExtractor(scale=2))
    callback = PromptEvaluation(extractor, **{**OPTIONS, **asked, **options})
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


class Counted(CaptionedDigits):
    """It notes which images it was asked for."""

    def images(self, indices, shape):
        self.asked = [*getattr(self, "asked", []), *indices]
        return super().images(indices, shape)


def samples_of(folder, captions, seed=10_000_000):
    """The teacher's images (N, 1, 16, 16) uint8 for captions, made in another way."""
    teacher = load_denoiser(folder)
    noise = seeded_noise(teacher.image_shape, [seed + i for i in range(len(captions))])
    condition = {"prompt_embeds": teacher.codec.embed(captions)}
    latents = sample(
        GuidedDenoiser(teacher, 2.0), noise, steps=3, solver="ddim", condition=condition
    )
    return to_uint8(teacher.decode(latents))


def test_a_source_gives_prompts_and_the_images_to_compare_with(folder, tmp_path, capsys):
    source, extractor = Counted(), DigitsExtractor(scale=2)
    rows = evaluated(DiffusionTeacher(folder), folder, tmp_path, source=source)
    assert source.asked == list(range(48))
    captions = source.captions[:24]
    assert len(set(captions)) > 10
    images = samples_of(folder, captions)
    real, following = (
        extractor(source.images(part, (1, 16, 16))) for part in (range(24), range(24, 48))
    )
    assert [row["method"] for row in rows] == ["teacher", "real"]
    assert rows[0]["fd_digits"] == pytest.approx(
        frechet_distance(real, extractor(images)), rel=1e-4
    )
    floor = frechet_distance(real, following)
    assert rows[1]["fd_digits"] == rows[0]["floors"]["fd_digits"] == pytest.approx(floor)
    assert rows[0]["label_accuracy"] is None and rows[0]["dataset"] == "captions"
    assert rows[0]["reference_images"] == {"teacher": 24, "test": 24}
    table = capsys.readouterr().out
    assert "fd_digits: to the 24 images that the prompts were written for" in table
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(rows))
    assert Image.open(tmp_path / "comparison.png").height > 800  # ten captions


def test_the_picture_shows_a_source_beside_the_models(folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(prompt_evaluation, "draw_rows", lambda *given: drawn.append(given))
    source = CaptionedDigits()
    evaluated(DiffusionTeacher(folder), folder, tmp_path, source=source)
    [(rows, _, columns, title)] = drawn
    assert list(rows) == source.captions[:10] and columns == 2
    own = torch.stack([images[1] for images in rows.values()])
    assert torch.equal(own, source.images(range(10), (1, 16, 16)))
    made = torch.stack([images[0] for images in rows.values()])
    expected = samples_of(folder, source.captions[:10])
    assert (made.int() - expected.int()).abs().max() <= 1
    assert title == "1 image each: 3 steps of the teacher, guidance 2; the source's own"


def test_a_small_source_has_no_floor_and_is_asked_again(folder, tmp_path):
    source = Counted()
    source.captions = source.captions[:20]
    rows = evaluated(DiffusionTeacher(folder), folder, tmp_path, source=source)
    assert [row["method"] for row in rows] == ["teacher"] and source.asked == list(range(20))
    assert rows[0]["reference_images"] == {"teacher": 24, "test": 20}
    assert "fd_digits" not in rows[0]["floors"] and rows[0]["fd_digits"] > 0


def test_captions_alone_are_asked_for_and_compared_with_nothing(folder, tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    source = CaptionedFolder(str(tmp_path), images=False)
    rows = evaluated(DiffusionTeacher(folder), folder, tmp_path / "run", source=source)
    assert rows[0]["fd_digits"] is None and rows[0]["coverage"] is not None
    assert rows[0]["reference_images"] == {"teacher": 24}


def test_the_clip_score_is_that_of_the_prompts(folder, tmp_path, capsys):
    clip = clip_folder(tmp_path / "clip", seed=2)
    options = {"source": CaptionedDigits(), "clip_score": ClipScore(clip), "steps": (1,)}
    module = LatentConsistencyDistillation(folder, guidance=(1.5, 3.0))
    teacher, student, real = evaluated(module, folder, tmp_path / "run", **options)
    captions, source = CaptionedDigits().captions, CaptionedDigits()
    for row, asked, images in [
        (teacher, captions[:24], samples_of(folder, captions[:24])),
        (real, captions[24:48], source.images(range(24, 48), (1, 16, 16))),
    ]:
        expected = 100 * by_hand(clip, images.expand(-1, 3, -1, -1), asked).mean()
        assert expected > 1  # negative ones count 0
        assert row["clip_score"] == pytest.approx(float(expected), rel=1e-3)
    assert student["clip_score"] not in (None, teacher["clip_score"])
    assert f"clip_score: 100 cos(image, prompt) by {clip}" in capsys.readouterr().out


def test_two_processes_measure_what_one_does(folder, tmp_path):
    clip = clip_folder(tmp_path / "clip", seed=2)
    evaluate(folder, clip, tmp_path / "one", 1)
    script = Path(__file__).parent / "prompt_script.py"
    done = run_script(script, folder, clip, tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two"))
    assert [row["method"] for row in two] == ["teacher", "LatentConsistencyDistillation", "real"]
    for row, expected in zip(two, one, strict=True):
        for name in expected.keys() - {"latency_ms", "images_per_second", "throughput"}:
            if isinstance(expected[name], float):
                assert row[name] == pytest.approx(expected[name], rel=1e-6), name
    assert one[0]["clip_score"] > 1 and one[1]["paired_distance"] > 0


def test_of_large_sets_few_images_are_kept(folder, tmp_path, monkeypatch):
    module = LatentConsistencyDistillation(folder, guidance=(1.5, 3.0))
    whole = evaluated(module, folder, tmp_path / "a", steps=(1,))[1]
    monkeypatch.setattr(prompted_images, "_KEPT", 13)
    part = evaluated(module, folder, tmp_path / "b", steps=(1,))[1]
    for name in ("fd_teacher_digits", "coverage", "recall", "label_accuracy"):
        assert part[name] == whole[name]
    assert part["paired_distance"] != whole["paired_distance"]
    monkeypatch.undo()
    first = evaluated(module, folder, tmp_path / "c", steps=(1,), num_samples=13)[1]
    assert part["paired_distance"] == pytest.approx(first["paired_distance"], rel=1e-3)


class Pixels(PixelExtractor):
    """A distance with Inception's name."""

    name = "inception"

    def __init__(self):
        super().__init__(256)


@pytest.mark.parametrize("asked", [{}, {"source": CaptionedDigits()}])
def test_the_distance_is_named_by_its_extractor(folder, tmp_path, capsys, asked):
    row = evaluated(DiffusionTeacher(folder), folder, tmp_path, extractor=Pixels(), **asked)[0]
    assert (row["fid"] is not None) == bool(asked) and row["fd_teacher_inception"] > 0
    assert ("fid: to the 24 images" in capsys.readouterr().out) == bool(asked)


def test_rows_of_before_the_clip_score_are_still_read(folder, tmp_path):
    rows = evaluated(DiffusionTeacher(folder), folder, tmp_path)
    old = [{key: row[key] for key in row if not key.startswith("clip_")} for row in rows]
    assert format_table(old, "digits") == format_table(rows, "digits")


def test_a_yaml_names_the_source_and_the_clip_model(tmp_path):
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback

    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    init_args = {
        "extractor": {
            "class_path": "lit_distill.metrics.DigitsExtractor",
            "init_args": {"scale": 2},
        },
        "source": {"class_path": "lit_distill.datamodules.CaptionedDigits"},
        "clip_score": {
            "class_path": "lit_distill.metrics.ClipScore",
            "init_args": {"model": clip_folder(tmp_path)},
        },
    }
    given = {"class_path": "lit_distill.callbacks.PromptEvaluation", "init_args": init_args}
    made = parser.instantiate_classes(parser.parse_object({"callback": given})).callback
    assert isinstance(made.source, CaptionedImages) and isinstance(made.clip_score, ClipScore)
    assert made.prompts == CaptionedDigits().captions


def test_impossible_options_are_refused():
    extractor = DigitsExtractor(scale=2)
    with pytest.raises(ValueError, match=r"either at least one prompt .* it was given neither"):
        PromptEvaluation(extractor, [])
    with pytest.raises(ValueError, match=r"it was given both"):
        PromptEvaluation(extractor, PROMPTS, source=CaptionedDigits())
    with pytest.raises(ValueError, match="1 labels are given for 4 prompts"):
        PromptEvaluation(extractor, PROMPTS, labels=[0])
    with pytest.raises(ValueError, match="num_samples of at least 2"):
        PromptEvaluation(extractor, PROMPTS, num_samples=1)
