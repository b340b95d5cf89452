from types import SimpleNamespace

import pytest
from small_teacher import export as write_folder
from toy import Toy, ToyData, ToyDenoiser, trainer

from lit_distill.callbacks import ExportPipeline, export
from lit_distill.callbacks.report import make_row, write_rows


class Staged(Toy):
    """Names a stage's folder after every second step, and one that is not its own after none."""

    @property
    def network(self):
        return self.student

    def milestone(self):
        step = self.trainer.global_step
        return f"stage-{step}" if step % 2 == 0 else None


class Plain(Toy):
    @property
    def network(self):
        return self.student


@pytest.fixture
def exported(monkeypatch):
    """What was exported: the folder and the weight of that moment."""
    seen = []
    monkeypatch.setattr(
        export, "save_denoiser", lambda model, folder: seen.append((folder, model.bias.item()))
    )
    monkeypatch.setattr(export, "write_card", lambda folder, **recipe: True)
    return seen


def fit(root, module, folder=None, **options):
    options = {"max_steps": 5, **options}
    trainer(root, ExportPipeline(folder), **options).fit(module, ToyData(batch_size=40))


def test_a_milestone_is_exported_with_the_weights_of_its_moment(tmp_path, exported, capsys):
    module = Staged(bias=2.0)
    fit(tmp_path, module)
    folders = [folder for folder, _ in exported]
    assert folders == [tmp_path / "stage-2", tmp_path / "stage-4", tmp_path / "pipeline"]
    weights = [weight for _, weight in exported]
    assert len(set(weights)) == 3 and weights[-1] == module.student.bias.item()
    assert (
        f"Exported the weights of this stage to {tmp_path / 'stage-2'}" in capsys.readouterr().out
    )


def test_a_module_without_milestones_is_exported_at_the_end(tmp_path, exported):
    fit(tmp_path, Plain(), folder=tmp_path / "elsewhere")
    assert [folder for folder, _ in exported] == [tmp_path / "elsewhere"]


def test_a_run_that_only_looks_for_errors_exports_nothing(tmp_path, exported):
    fit(tmp_path, Staged(), max_steps=-1, fast_dev_run=2)
    assert not exported


@pytest.mark.parametrize(("first", "writes"), [(True, True), (False, False)])
def test_one_of_several_processes_writes(tmp_path, exported, first, writes):
    module = Staged()
    process = SimpleNamespace(is_global_zero=first, default_root_dir=tmp_path, global_step=1)
    module.milestone = lambda: "stage-1"
    ExportPipeline().on_train_batch_end(process, module, None, None, 0)
    assert bool(exported) == writes


class Recorded(Plain):
    """With settings, a teacher, and its books closed at the end of a fit."""

    def __init__(self, teacher=None, weight=1.0, clip=(1, 2), optimizer=None, **options):
        super().__init__(**options)
        self.save_hyperparameters()

    def on_fit_end(self):
        self.teacher_evaluations = 99


def test_a_card_says_how_it_was_trained(tmp_path, monkeypatch):
    folder, cards = tmp_path / "pipeline", []
    monkeypatch.setattr(export, "save_denoiser", lambda model, folder: None)
    monkeypatch.setattr(
        export, "write_card", lambda at, **recipe: cards.append((at, recipe)) or True
    )
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02, "fused": None}}
    teacher = "/home/someone/runs/toy/teacher/pipeline"
    fit(tmp_path, Recorded(teacher, bias=0.5, weight=0.25, clip=[1, 2], optimizer=adam))
    (at, recipe), facts = cards[0], cards[0][1]["facts"]
    assert len(cards) == 1 and at == folder
    assert (recipe["method"], recipe["teacher"]) == ("Recorded", teacher)
    assert recipe["student_updates"] == 5
    assert facts["Settings that differ from its defaults"].split("\n  - ") == [
        "",
        "`weight = 0.25`",
        "`optimizer = Adam(lr=0.02)`",
        "`bias = 0.5`",
    ]
    assert facts["Teacher"] == "`toy/teacher/pipeline`"  # nobody's home goes to the hub
    assert facts["Data"] == "toy, batches of 40 a process"
    assert (facts["Student updates"], facts["Teacher evaluations"]) == ("5", "99")
    assert facts["Solver"] == "euler"


@pytest.mark.parametrize(("tested", "told"), [(4, True), (3, False)])
def test_a_test_of_the_exported_weights_brings_its_numbers(tmp_path, tested, told):
    folder = write_folder(tmp_path / "pipeline")
    export.write_card(folder, method="DMD", student_updates=4)
    row = {"method": "DMD", "nfe": 1, "fd_teacher": 0.125, "student_updates": tested}
    references = {"floors": {}, "reference_images": {"teacher": 200}}
    write_rows([make_row("digits", **row, **references)], tmp_path / "metrics.json")
    process = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path)
    ExportPipeline().on_test_end(process, Plain())
    text = (folder / "README.md").read_text()
    assert ("0.125" in text) == told and ("None were measured" in text) != told


def test_a_teacher_that_is_an_object_has_no_name(tmp_path, monkeypatch):
    cards = []
    monkeypatch.setattr(export, "save_denoiser", lambda model, folder: None)
    monkeypatch.setattr(export, "write_card", lambda at, **recipe: cards.append(recipe) or True)
    module = Plain()
    module.teacher = ToyDenoiser()
    fit(tmp_path, module)
    assert cards[0]["teacher"] == "" and cards[0]["facts"]["Teacher"] == "another model"
