"""What runs a comparison consists of, and what a budget makes of a configuration."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lit_distill.comparison.evaluation import Judge
from lit_distill.comparison.plan import Budget, Comparison, Entry, Plan, shortened
from lit_distill.datamodules import DigitsDataModule
from lit_distill.metrics import DigitsExtractor

CONFIGS = Path(__file__).parents[2] / "configs"


def plan(*entries: Entry, teacher: str = str(CONFIGS / "digits/teacher.yaml"), **more) -> Plan:
    judge = Judge(DigitsDataModule(), DigitsExtractor())
    return Plan(Comparison("out", teacher, list(entries), judge, **more))


def entry(file: str, **more) -> Entry:
    return Entry(str(CONFIGS / f"digits/{file}.yaml"), file, "family", **more)


class TestRuns:
    def test_what_a_configuration_reads_is_made_first(self) -> None:
        flow = str(CONFIGS / "digits/flow.yaml")
        order = plan(entry("flow_distillation", teacher=flow)).order("flow_distillation")
        names = [run.name for run in order]
        assert names == ["flow", "flow_pairs", "reflow", "flow_distillation"]
        # The teacher and the pairs are as configured; the stage before is a method of its own.
        assert [run.budgeted for run in order] == [False, False, True, True]
        assert [run.writes_pairs for run in order] == [False, True, False, False]

    def test_all_paths_move_to_the_folder_of_the_comparison(self) -> None:
        config = plan(entry("kd"), seed=3).run("kd").config
        assert config.model.init_args.teacher == "out/teacher/pipeline"
        assert config.data.init_args.folder == "out/pairs"
        assert config.trainer.default_root_dir == "out/kd"
        assert config.seed_everything == 3
        schedule = OmegaConf.to_container(config)["model"]["init_args"]["lr_scheduler"]
        assert schedule["init_args"]["total_steps"] == "${trainer.max_steps}"

    def test_a_teacher_that_is_there_stands_for_the_one_of_the_configurations(self) -> None:
        made = plan(entry("cd"), entry("kd"), teacher="org/model")
        assert made.run("cd").config.model.init_args.teacher == "org/model"
        assert [run.name for run in made.order("cd")] == ["cd"]
        pairs = made.order("kd")[0]
        assert (pairs.name, pairs.config.model.init_args.denoiser) == ("pairs", "org/model")

    def test_one_configuration_may_be_several_entries(self) -> None:
        lora = entry("dmd2", name="dmd2_lora", overrides={"model.init_args.lora.rank": 8})
        made = plan(entry("dmd2"), lora, overrides={"trainer.precision": "32-true"})
        first, second = made.run("dmd2").config, made.run("dmd2_lora").config
        assert "lora" not in first.model.init_args
        assert second.model.init_args.lora.rank == 8
        assert second.trainer.default_root_dir == "out/dmd2_lora"
        assert first.trainer.precision == second.trainer.precision == "32-true"

    def test_what_nobody_makes_is_named(self, tmp_path: Path) -> None:
        text = (CONFIGS / "digits/kd.yaml").read_text()
        (tmp_path / "kd.yaml").write_text(text)
        teacher = str(CONFIGS / "digits/teacher.yaml")
        lonely = plan(Entry(str(tmp_path / "kd.yaml"), "kd", "ODE"), teacher=teacher)
        with pytest.raises(FileNotFoundError, match=r"reads runs/digits/pairs, but there is"):
            lonely.order("kd")

    def test_runs_that_read_each_other_are_refused(self, tmp_path: Path) -> None:
        for name, other in (("a", "b"), ("b", "a")):
            config = {"trainer": {"default_root_dir": f"runs/x/{name}"}, "model": f"runs/x/{other}"}
            OmegaConf.save(config, tmp_path / f"{name}.yaml")
        looped = plan(Entry(str(tmp_path / "a.yaml"), "a", "x"), teacher="org/model")
        with pytest.raises(ValueError, match="read each other: a -> b -> a"):
            looped.order("a")

    def test_two_entries_of_one_name_are_refused(self) -> None:
        with pytest.raises(ValueError, match="cd stands there more than once"):
            plan(entry("cd"), entry("cd"))

    @pytest.mark.parametrize("text", ["[1, 2]", "a: [", "model: x"])
    def test_a_file_that_is_no_configuration(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.yaml"):
            plan(Entry(str(tmp_path / "bad.yaml"), "x", "y")).order("bad")

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("compare/*.yaml")), ids=lambda p: p.stem)
    def test_the_comparisons_of_the_repository_fit_together(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(CONFIGS.parent)
        given = OmegaConf.to_container(OmegaConf.load(path))
        listed = given.get("entries") or given["entries+"]  # laid over another file
        made = plan(*(Entry(**item) for item in listed))
        for name in made.entries:
            for run in made.order(name):
                if run.budgeted:
                    assert shortened(run.config, 60).trainer.max_steps == 60


class TestBudget:
    @pytest.mark.parametrize(
        ("text", "amount", "unit"),
        [
            ("60 seconds", 60, "seconds"),
            ("0.5 seconds", 0.5, "seconds"),
            ("1,000 updates", 1000, "updates"),
            ("200_000 teacher evaluations", 200_000, "teacher evaluations"),
            ("as configured", 0, ""),
        ],
    )
    def test_reads(self, text: str, amount: float, unit: str) -> None:
        assert Budget.of(text) == Budget(amount, unit)

    @pytest.mark.parametrize(
        "text", ["60", "seconds", "-1 seconds", "0 updates", "1 hour", "., updates"]
    )
    def test_refuses(self, text: str) -> None:
        with pytest.raises(ValueError, match="'60 seconds', or 'as configured'"):
            Budget.of(text)

    def test_every_length_is_scaled_alike(self) -> None:
        config = OmegaConf.load(CONFIGS / "digits/ct.yaml")
        short = shortened(config, 500)  # a quarter
        assert short.trainer.max_steps == 500
        assert short.trainer.val_check_interval == 500
        assert short.trainer.callbacks[0].init_args.every_n_train_steps == 120  # 125, by twelves
        assert short.trainer.callbacks[1].init_args.every_n_steps == 125
        assert short.model.init_args.stage_updates == 62
        assert short.model.init_args.lr_scheduler.init_args.total_steps == 500
        assert short.model.init_args.lr_scheduler.init_args.pct_start == 0.1
        assert short.trainer.limit_val_batches == 0
        assert config.trainer.max_steps == 2000

    def test_validation_stays_where_a_checkpoint_is_chosen_by_it(self) -> None:
        short = shortened(OmegaConf.load(CONFIGS / "mnist/dmd.yaml"), 100)
        assert "limit_val_batches" not in short.trainer

    def test_stages_keep_their_shares_and_fill_the_budget(self) -> None:
        config = OmegaConf.load(CONFIGS / "digits/pd.yaml")
        for updates in (6, 7, 100, 1601):
            stages = shortened(config, updates).model.init_args.updates
            assert sum(stages) == updates
            assert min(stages) >= 1
        assert list(shortened(config, 3200).model.init_args.updates)[-1] == pytest.approx(
            1000, abs=5
        )
        with pytest.raises(ValueError, match="5 updates is too small for 6 stages"):
            shortened(config, 5)

    def test_a_configuration_without_a_length_cannot_be_scaled(self) -> None:
        with pytest.raises(ValueError, match=r"trainer\.max_steps"):
            shortened(OmegaConf.create({"trainer": {"max_epochs": 3}}), 10)
