"""What a run leaves about its cost."""

import json
from pathlib import Path

from ended import Command
from small_teacher import export, write_config


def cost(root: str) -> dict:
    return json.loads((Path(root) / "cost.json").read_text())


def test_a_fit_counts_over_restarts(command: Command, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert command("fit", "--config", config).status == 0
    first = cost("runs/teacher")
    assert first["student_updates"] == first["updates_here"] == 3
    assert first["teacher_evaluations"] == 0
    assert 0 < first["seconds_per_update"] < first["train_seconds"] + 5
    assert first["peak_memory_mb"] > 100
    on = ("--ckpt_path", "last", "--trainer.max_steps", 8)
    assert command("fit", "--config", config, *on).status == 0
    second = cost("runs/teacher")
    assert (second["student_updates"], second["updates_here"]) == (8, 5)
    assert second["train_seconds"] > first["train_seconds"]


def test_the_writing_of_pairs_is_timed(command: Command, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    export(tmp_path / "small")
    writer = "--trainer.callbacks+=lit_distill.callbacks.PairWriter"
    options = (writer, "--trainer.callbacks.folder", "pairs")
    given = (
        "--model.init_args.denoiser",
        tmp_path / "small",
        "--trainer.default_root_dir",
        "pairs",
    )
    ended = command("predict", "--config", config, *options, *given)
    assert ended.status == 0, ended.err
    assert cost("pairs")["seconds"] > 0
