"""The command line as users call it, on a small teacher of real digits."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ended import Command
from lightning.pytorch import Trainer
from small_teacher import export, write_config

from lit_distill.methods import DiffusionTeacher

ROOT = Path("runs/teacher")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture
def trained(command: Command, config: Path) -> Path:
    """The run folder of a fit of 3 steps."""
    ended = command("fit", "--config", config)
    assert ended.status == 0, ended.err
    return ROOT


def saved(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "config.yaml").read_text())


def steps_of(root: Path) -> int:
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def content(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


class TestWords:
    def test_help_names_every_command(self, command: Command) -> None:
        ended = command("--help")
        assert ended.status == 0
        for word in (
            "fit",
            "validate",
            "test",
            "predict",
            "sample",
            "import",
            "export",
            "compare",
            "examples:",
        ):
            assert word in ended.out
        assert len(ended.out.splitlines()) < 25

    def test_version_imports_nothing_heavy(self, version: str) -> None:
        code = "import sys; from lit_distill.main import main; main(['--version'])\n"
        code += "print([m for m in ('lightning', 'diffusers', 'torchvision') if m in sys.modules])"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ended.stdout.splitlines() == [version, "[]"], ended.stderr

    def test_the_package_is_a_program(self, version: str) -> None:
        arguments = [sys.executable, "-m", "lit_distill", "--version"]
        assert subprocess.run(arguments, capture_output=True, text=True).stdout == version + "\n"

    @pytest.mark.parametrize("args", [[], ["trian"], ["--bogus"]])
    def test_a_wrong_word_ends_with_2(self, command: Command, args: list[str]) -> None:
        ended = command(*args)
        assert ended.status == 2
        assert (
            "choose one of fit, validate, test, predict, sample, import, export, compare"
            in ended.error
        )

    def test_help_of_a_command(self, command: Command) -> None:
        ended = command("fit", "--help")
        assert ended.status == 0
        assert "--trainer.max_steps" in ended.out


class TestRunFolder:
    def test_a_fit_writes_into_it(self, trained: Path) -> None:
        assert steps_of(trained) == 3
        assert [path.name for path in trained.glob("checkpoints/*")] == ["last.ckpt"]
        assert len(list(trained.glob("events.out.tfevents.*"))) == 1
        assert not list(trained.glob("*.tmp"))
        assert [path.name for path in Path().iterdir() if path.is_dir()] == ["runs"]

    def test_the_saved_configuration_repeats_the_run(self, command: Command, trained: Path) -> None:
        first = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
        again = command("fit", "--config", trained / "config.yaml",
                        "--trainer.default_root_dir", "again")  # fmt: skip
        assert again.status == 0, again.err
        second = torch.load("again/checkpoints/last.ckpt", weights_only=True)
        for name, weights in first["state_dict"].items():
            assert torch.equal(weights, second["state_dict"][name]), name

    def test_a_second_fit_is_refused(self, command: Command, config: Path, trained: Path) -> None:
        before = content(trained)
        ended = command("fit", "--config", config)
        assert ended.status == 1
        assert "holds a run already" in ended.error
        assert "--ckpt_path last" in ended.error
        assert "--overwrite true" in ended.error
        assert content(trained) == before

    def test_last_goes_on(self, command: Command, config: Path, trained: Path) -> None:
        options = ("--trainer.max_steps", 5, "--ckpt_path", "last")
        ended = command("fit", "--config", config, *options)
        assert ended.status == 0, ended.err
        assert steps_of(trained) == 5
        assert [path.name for path in trained.glob("checkpoints/*")] == ["last.ckpt"]
        assert saved(trained)["trainer"]["max_steps"] == 5
        assert saved(trained)["ckpt_path"] is None  # the file starts a run, it does not go on

    def test_last_of_a_finished_run_changes_nothing(
        self, command: Command, config: Path, trained: Path
    ) -> None:
        before = (trained / "checkpoints" / "last.ckpt").read_bytes()
        assert command("fit", "--config", config, "--ckpt_path", "last").status == 0
        assert (trained / "checkpoints" / "last.ckpt").read_bytes() == before

    def test_last_begins_where_there_is_no_run(self, command: Command, config: Path) -> None:
        ended = command("fit", "--config", config, "--ckpt_path", "last")
        assert ended.status == 0, ended.err
        assert steps_of(ROOT) == 3

    def test_last_does_not_begin_over_results(
        self, command: Command, config: Path, trained: Path
    ) -> None:
        shutil.rmtree(trained / "checkpoints")
        (trained / "metrics.json").write_text("[]")
        ended = command("fit", "--config", config, "--ckpt_path", "last")
        assert ended.status == 1
        assert "last.ckpt is missing, so that the run cannot go on" in ended.error

    def test_a_run_that_was_moved_goes_on_in_its_own_files(
        self, command: Command, config: Path, trained: Path
    ) -> None:
        """Lightning forgets a checkpoint's name with its folder, and would write last-v1.ckpt."""
        shutil.move(trained, "moved")
        options = ("--trainer.max_steps", 5, "--ckpt_path", "last")
        folder = ("--trainer.default_root_dir", "moved")
        assert command("fit", "--config", config, *options, *folder).status == 0
        assert [path.name for path in Path("moved/checkpoints").iterdir()] == ["last.ckpt"]
        assert steps_of(Path("moved")) == 5

    def test_overwrite_replaces_the_run_and_leaves_other_files(
        self, command: Command, config: Path, trained: Path
    ) -> None:
        events = list(trained.glob("events*"))
        for name in ("pipeline/x", "samples/x", "metrics.json", "notes.txt", "checkpoints/x.ckpt"):
            (trained / name).parent.mkdir(exist_ok=True)
            (trained / name).write_text("old")
        options = ("--overwrite", "true", "--trainer.max_steps", 2)
        ended = command("fit", "--config", config, *options)
        assert ended.status == 0, ended.err
        assert steps_of(trained) == 2
        names = {path.name for path in trained.iterdir()}
        assert names - {"hparams.yaml"} >= {"checkpoints", "config.yaml", "notes.txt"}
        assert not names & {"pipeline", "samples", "metrics.json", *(e.name for e in events)}
        assert saved(trained)["overwrite"] is False

    def test_an_overwrite_that_fails_to_start_loses_nothing(
        self, command: Command, config: Path, trained: Path
    ) -> None:
        before = content(trained)
        options = ("--overwrite", "true", "--data.init_args.batch_size", 5000)
        ended = command("fit", "--config", config, *options)
        assert ended.status == 1
        assert "batch_size=5000" in ended.error
        after = content(trained)
        assert {name: after.get(name) for name in before} == before

    def test_overwriting_and_going_on_contradict(
        self, command: Command, config: Path, trained: Path
    ) -> None:
        ended = command("fit", "--config", config, "--overwrite", "true", "--ckpt_path", "last")
        assert ended.status == 1
        assert "give one of them" in ended.error

    def test_a_trial_run_leaves_it_alone(
        self, command: Command, config: Path, trained: Path
    ) -> None:
        before = content(trained)
        options = ("--trainer.fast_dev_run", "true", "--overwrite", "true")
        assert command("fit", "--config", config, *options).status == 0
        assert content(trained) == before

    def test_it_must_be_named(self, command: Command, config: Path) -> None:
        ended = command("fit", "--config", config, "--trainer.default_root_dir", "null")
        assert ended.status == 1
        assert "The run has no folder" in ended.error

    def test_own_loggers_and_checkpoints_do_not_move_it(
        self, command: Command, config: Path
    ) -> None:
        own = config.with_name("own.yaml")
        own.write_text(
            "trainer:\n"
            "  logger: {class_path: lightning.pytorch.loggers.CSVLogger,"
            " init_args: {save_dir: elsewhere}}\n"
            "  callbacks:\n"
            "    - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
            "      init_args: {filename: last, every_n_train_steps: 1}\n"
        )
        ended = command("fit", "--config", config, "--config", own)
        assert ended.status == 0, ended.err
        assert [path.name for path in ROOT.glob("checkpoints/*")] == ["last.ckpt"]
        assert (ROOT / "config.yaml").exists()
        assert list(Path("elsewhere").rglob("metrics.csv"))


class TestOtherCommands:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """What the trainer was asked to do, in place of doing it."""
        asked: dict[str, Any] = {}

        def note(trainer: Trainer, **options: Any) -> None:
            asked.update(options)

        for name in ("test", "validate", "predict"):  # the options are read off the signature
            monkeypatch.setattr(Trainer, name, functools.wraps(getattr(Trainer, name))(note))
        return asked

    @pytest.mark.parametrize("word", ["test", "validate", "predict"])
    def test_best_is_taken_then_last_then_the_model_as_configured(
        self, command: Command, config: Path, asked: dict[str, Any], word: str
    ) -> None:
        for name in (None, "last", "best"):
            if name is not None:
                (ROOT / "checkpoints").mkdir(parents=True, exist_ok=True)
                (ROOT / "checkpoints" / f"{name}.ckpt").write_text("")
            assert command(word, "--config", config).status == 0
            expected = None if name is None else str(ROOT / "checkpoints" / f"{name}.ckpt")
            assert asked["ckpt_path"] == expected
            assert asked["weights_only"] is True

    def test_a_test_reads_the_weights_and_leaves_the_fits_configuration(
        self, command: Command, config: Path, trained: Path
    ) -> None:
        before = (trained / "config.yaml").read_bytes()
        ended = command("test", "--config", config, "--data.init_args.batch_size", 32)
        assert ended.status == 0, ended.err
        assert (trained / "config.yaml").read_bytes() == before

    def test_a_saved_configuration_serves_every_command(
        self, command: Command, trained: Path
    ) -> None:
        for word in ("test", "validate", "predict"):
            ended = command(word, "--config", trained / "config.yaml")
            assert ended.status == 0, ended.err

    def test_predict_needs_no_checkpoint(self, command: Command, config: Path) -> None:
        teacher = export(Path("exported"))
        model = ("--model.init_args.denoiser", teacher)
        assert command("predict", "--config", config, *model).status == 0
        assert saved(ROOT)["model"]["init_args"]["denoiser"] == str(teacher)
        assert {path.name for path in ROOT.iterdir()} == {"config.yaml", "cost.json"}

    def test_a_missing_checkpoint_is_named(self, command: Command, config: Path) -> None:
        ended = command("test", "--config", config, "--ckpt_path", "nope.ckpt")
        assert ended.status == 1
        assert "there is no checkpoint nope.ckpt" in ended.error


class TestCheckpoints:
    def test_they_hold_plain_data_and_rebuild_the_module(self, trained: Path) -> None:
        path = trained / "checkpoints" / "last.ckpt"
        checkpoint = torch.load(path, weights_only=True)  # fails on any pickled object
        arguments = checkpoint["hyper_parameters"]
        assert arguments["_class_path"] == "lit_distill.methods.DiffusionTeacher"
        module = DiffusionTeacher.load_from_checkpoint(path, weights_only=True)
        for name, weights in module.state_dict().items():
            assert torch.equal(weights, checkpoint["state_dict"][name]), name

    def test_one_of_another_model_is_refused(
        self, command: Command, config: Path, trained: Path
    ) -> None:
        network = "--model.init_args.denoiser.init_args.network.init_args.block_out_channels"
        ended = command("fit", "--config", config, "--ckpt_path", "last", network, "[8,16]")
        assert ended.status == 1
        assert "The checkpoint is damaged or does not fit the configured model" in ended.error

    def test_a_truncated_one_is_refused(
        self, command: Command, config: Path, trained: Path
    ) -> None:
        path = trained / "checkpoints" / "last.ckpt"
        path.write_bytes(path.read_bytes()[:1000])
        ended = command("test", "--config", config)
        assert ended.status == 1
        assert "The checkpoint is damaged or does not fit" in ended.error

    def test_the_command_line_wins_over_a_checkpoint(
        self, command: Command, config: Path, trained: Path
    ) -> None:
        """LightningCLI alone lets the hyperparameters of a --ckpt_path file win."""
        shutil.copy(trained / "checkpoints" / "last.ckpt", "copy.ckpt")
        options = ("--ckpt_path", "copy.ckpt", "--model.init_args.ema_decay", 0.5)
        new = ("--trainer.default_root_dir", "new", "--trainer.max_steps", 4)
        assert command("fit", "--config", config, *options, *new).status == 0
        assert saved(Path("new"))["model"]["init_args"]["ema_decay"] == 0.5


class TestConfigurations:
    """Lightning's parser of interpolations is easily set so that these fail."""

    def test_an_override_reaches_what_is_interpolated_from_it(
        self, command: Command, config: Path
    ) -> None:
        ended = command("fit", "--config", config, "--trainer.max_steps", 2)
        assert ended.status == 0, ended.err
        schedule = saved(ROOT)["model"]["init_args"]["lr_scheduler"]
        assert schedule["init_args"]["T_max"] == 2

    def test_of_several_files_the_later_wins_and_all_share_their_values(
        self, command: Command, config: Path
    ) -> None:
        second = config.with_name("second.yaml")
        second.write_text(
            "trainer: {max_steps: 2, default_root_dir: second}\n"
            "data: {init_args: {batch_size: 32, predict_batch_size: '${.batch_size}'}}\n"
            "model: {init_args: {solver: euler, steps: '${trainer.max_steps}'}}\n"
        )
        third = config.with_name("third.yaml")
        third.write_text("data: {init_args: {batch_size: 16}}\n")
        ended = command("fit", "--config", config, "--config", second, "--config", third)
        assert ended.status == 0, ended.err
        parsed = saved(Path("second"))
        model = parsed["model"]["init_args"]
        assert parsed["data"]["init_args"]["batch_size"] == 16
        assert parsed["data"]["init_args"]["predict_batch_size"] == 16
        assert parsed["data"]["init_args"]["predict_samples"] == 20  # of the first file
        assert (model["solver"], model["steps"]) == ("euler", 2)
        assert model["lr_scheduler"]["init_args"]["T_max"] == 2
        assert steps_of(Path("second")) == 2


class TestErrors:
    NETWORK = "--model.init_args.denoiser.init_args.network.init_args."

    @pytest.mark.parametrize(
        ("options", "status", "words"),
        [
            (["--config", "nope.yaml"], 2, "File does not exist"),
            (["--bogus", "1"], 2, "unrecognized arguments: --bogus"),
            (["--trainer.max_steps", "many"], 2, "Expected a <class 'int'>. Got value: many"),
            (["--model.init_args.bogus", "1"], 2, "Option 'bogus' is not accepted"),
            ([NETWORK + "bogus", "1"], 2, "Option 'bogus' is not accepted"),
            (["--data", "lit_distill.datamodules.Foo"], 2, "has no attribute 'Foo'"),
            ([NETWORK + "norm_num_groups", "3"], 1, "must be multiples of norm_num_groups=3"),
            (["--data.init_args.batch_size", "0"], 1, "batch_size=0"),
            (["--model.init_args.denoiser", "nope/at/all"], 1, "There is no folder nope/at/all"),
            (["--trainer.accelerator", "nope"], 1, "nope"),
            (["--trainer.max_steps", "${nope.nope}"], 1, "nope.nope"),
        ],
    )
    def test_one_sentence_and_no_folder(
        self, command: Command, config: Path, options: list[str], status: int, words: str
    ) -> None:
        ended = command("fit", "--config", config, *options)
        assert ended.status == status
        assert words in ended.error
        assert "Union" not in ended.error
        assert len(ended.error) < 500
        assert not Path("runs").exists()

    def test_the_traceback_is_shown_on_demand(
        self, command: Command, config: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LIT_DISTILL_DEBUG", "1")
        with pytest.raises(ValueError, match="batch_size=0"):
            command("fit", "--config", config, "--data.init_args.batch_size", 0)


def test_a_fit_that_is_asked_to_end_has_not_succeeded(
    command: Command, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DiffusionTeacher.training_step

    def asked(module: DiffusionTeacher, *args: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(module, *args)

    monkeypatch.setattr(DiffusionTeacher, "training_step", asked)
    ended = command("fit", "--config", config)
    assert ended.status == 143
    assert ended.err.rstrip().endswith("lit-distill: stopped by SIGTERM")


def start_long_fit(config: Path, *options: str) -> "subprocess.Popen[str]":
    """Start a fit of many steps in a process of its own; returns after its first checkpoint."""
    arguments = ["fit", "--config", str(config), "--trainer.max_steps", "100000", *options]
    arguments += ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
    arguments += ["--trainer.callbacks.filename", "last"]
    arguments += ["--trainer.callbacks.every_n_train_steps", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_distill", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=config.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell starts what runs in its background with Ctrl-C ignored, and children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    last, deadline = config.parent / ROOT / "checkpoints" / "last.ckpt", time.monotonic() + 250
    begun = last.stat().st_mtime_ns if last.exists() else None
    while not last.exists() or last.stat().st_mtime_ns == begun:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.timeout(600)  # two starts of a process, on a machine that may be busy
def test_a_killed_fit_goes_on_and_control_c_stops_it(command: Command, config: Path) -> None:
    process = start_long_fit(config)
    process.kill()
    process.communicate()
    killed_at = steps_of(config.parent / ROOT)
    process = start_long_fit(config, "--ckpt_path", "last")
    process.send_signal(signal.SIGINT)
    try:
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()  # nothing goes on behind a test that failed
    assert process.returncode == 130, output
    assert output.rstrip().endswith("lit-distill: stopped")
    assert "Traceback" not in output
    assert steps_of(config.parent / ROOT) > killed_at
    assert [path.name for path in (config.parent / ROOT / "checkpoints").iterdir()] == ["last.ckpt"]
