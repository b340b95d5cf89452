from types import SimpleNamespace

import pytest
from toy import Toy, ToyData, trainer

from lit_distill.callbacks import ExportPipeline, export


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
    process, module = SimpleNamespace(is_global_zero=first, default_root_dir=tmp_path), Staged()
    module.milestone = lambda: "stage-1"
    ExportPipeline().on_train_batch_end(process, module, None, None, 0)
    assert bool(exported) == writes
