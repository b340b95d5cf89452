"""Model cards: what they say, and whose they are."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from small_text import text_folder
from tiny_networks import tiny_network

from lit_distill.diffusion import EDMDenoiser, FewSteps
from lit_distill.models import load_denoiser, model_card, save_denoiser, update_card, write_card

FACTS = {"Method": "`DMD`", "Student updates": "1,150"}


def student(folder: Path, *, classes: int | None = 10, few: FewSteps | None = None) -> Path:
    denoiser = EDMDenoiser(tiny_network(classes))
    denoiser.few_steps = few
    save_denoiser(denoiser, folder)
    return folder


def code_of(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


def test_the_card_of_a_one_step_student_opens_it(tmp_path, monkeypatch):
    folder = student(tmp_path / "pipeline", few=FewSteps((1,)))
    teacher = student(tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# Teacher\n")
    assert write_card(folder, method="DMD", facts=FACTS, teacher=str(teacher), student_updates=1150)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "mine")
    assert card.data.library_name == "diffusers" and "distillation" in card.data.tags
    assert "base_model" not in card.data.to_dict()  # a folder of this machine is no name on the hub
    assert "# DMD, 1 step" in card.text and "- **Student updates**: 1,150" in card.text
    assert "None were measured" in card.text and "`mine`" in card.text
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(code_of(card.text), found)
    assert type(found["pipe"]).__name__ == "ConsistencyModelPipeline"
    assert found["image"].size == (8, 8)


def test_the_card_of_a_folder_with_its_own_code_opens_it(tmp_path, monkeypatch):
    folder = student(tmp_path / "pipeline", few=FewSteps((4, 2), only=True))
    write_card(folder, method="SFD", facts=FACTS, teacher="google/ddpm-cifar10-32")
    card = ModelCard.load(folder / "README.md")
    assert "# SFD, 2 or 4 steps" in card.text
    assert card.data.base_model == "google/ddpm-cifar10-32"
    assert "licence of the teacher applies" in card.text and "not known here" in card.text
    assert "custom_pipeline=folder, trust_remote_code=True" in card.text
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(code_of(card.text), found)
    assert found["image"].size == (8, 8)


def test_the_card_of_a_text_to_image_teacher_opens_it(tmp_path, monkeypatch):
    folder = Path(text_folder(tmp_path / "pipeline"))
    write_card(folder, method="DiffusionTeacher", facts=FACTS)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-to-image"
    assert "the model has no teacher" in card.text
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(code_of(card.text).replace("num_inference_steps=50", "num_inference_steps=1"), found)
    assert type(found["pipe"]).__name__ == "StableDiffusionPipeline"


def test_the_card_of_a_text_to_image_student_asks_for_no_guidance(tmp_path):
    denoiser = load_denoiser(text_folder(tmp_path / "teacher"))
    denoiser.few_steps = FewSteps((1,))
    save_denoiser(denoiser, tmp_path / "pipeline")
    write_card(tmp_path / "pipeline", method="DMD", facts=FACTS, teacher=str(tmp_path / "teacher"))
    text = (tmp_path / "pipeline" / "README.md").read_text()
    assert "num_inference_steps=1, guidance_scale=1.0" in text
    assert json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["_class_name"] in (
        code_of(text)
    )


def test_a_teacher_that_its_pipeline_samples_badly_gets_no_such_lines(tmp_path):
    folder = student(tmp_path / "pipeline")
    write_card(folder, method="DiffusionTeacher", facts=FACTS)
    text = (folder / "README.md").read_text()
    assert "```python" not in text and "lit-distill sample . " in text


def test_numbers_and_a_name_leave_the_other_sections_alone(tmp_path):
    folder = student(tmp_path / "pipeline", few=FewSteps((1,)))
    write_card(folder, method="DMD", facts=FACTS)
    file = folder / "README.md"
    file.write_text(file.read_text() + "\n## My section\n\nMine \\1.\n")
    assert update_card(folder, "method  NFE\nDMD     1 \\g<0>", "someone/model")
    text = file.read_text()
    assert "DMD     1 \\g<0>" in text and "None were measured" not in text
    assert 'folder = "someone/model"' in text and "1,150" in text
    assert "## My section\n\nMine \\1.\n" in text
    assert update_card(folder)
    assert "DMD     1" in file.read_text() and 'folder = "."' in file.read_text()
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*"))


def test_a_missing_card_says_what_is_not_known(tmp_path):
    folder = student(tmp_path / "pipeline", few=FewSteps((1,)))
    assert update_card(folder)
    text = (folder / "README.md").read_text()
    assert "Not recorded" in text and "None were measured" in text


@pytest.mark.parametrize("broken", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "no metadata"])
def test_a_teacher_with_a_broken_card_has_no_known_licence(tmp_path, broken):
    folder, teacher = student(tmp_path / "pipeline"), tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "README.md").write_text(broken)
    write_card(folder, method="DMD", facts=FACTS, teacher=str(teacher))
    assert "not known here" in (folder / "README.md").read_text()


def test_a_card_of_the_users_own_outlives_exports(tmp_path):
    folder = student(tmp_path / "pipeline")
    (folder / "README.md").write_text("# Mine\n")
    student(folder, few=FewSteps((1,)))  # which replaces the folder
    assert not write_card(folder, method="DMD", facts=FACTS) and not update_card(folder, "1")
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert json.loads((folder / "lit_distill.json").read_text())["few_steps"] is not None


def test_a_card_of_ours_goes_with_the_model_it_describes(tmp_path):
    folder = student(tmp_path / "pipeline")
    write_card(folder, method="DMD", facts=FACTS)
    student(folder)
    assert not (folder / "README.md").exists()


def test_the_card_is_no_part_of_the_model(tmp_path):
    folder = student(tmp_path / "pipeline")
    before = load_denoiser(folder)
    write_card(folder, method="DMD", facts=FACTS)
    after = load_denoiser(folder)
    assert after.fingerprint() == before.fingerprint()
    assert all(map(torch.equal, after.parameters(), before.parameters()))


def test_the_licence_of_a_teacher_on_the_hub_is_read_where_it_was_fetched_to(tmp_path, monkeypatch):
    (tmp_path / "fetched.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    fetched = {("someone/model", "README.md"): str(tmp_path / "fetched.md")}
    monkeypatch.setattr(model_card, "try_to_load_from_cache", lambda *name: fetched.get(name))
    folder = student(tmp_path / "pipeline", few=FewSteps((1,)))
    write_card(folder, method="DMD", facts=FACTS, teacher="someone/model")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "creativeml-openrail-m" and "`creativeml" in card.text
    write_card(folder, method="DMD", facts=FACTS, teacher="someone/other")
    assert "not known here" in (folder / "README.md").read_text()


def test_a_teacher_without_a_name_has_no_known_licence(tmp_path, monkeypatch):
    folder = student(tmp_path / "pipeline", few=FewSteps((1,)))
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("---\nlicense: mit\n---\n")  # which is not the teacher's
    write_card(folder, method="DMD", facts=FACTS, teacher="")
    text = (folder / "README.md").read_text()
    assert "not known here" in text and "base_model" not in text and "mit`" not in text
