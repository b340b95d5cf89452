"""Two processes on the CPU train one model, and write the pairs that one process writes."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from alone import run_alone
from small_text import text_folder
from tiny import METHODS, write_config

SAVE = {"class_path": "tiny.SaveEachRank"}


@dataclass
class Run:
    """How one method is run.

    Attributes:
        arguments: Further options of the command line.
        limit: ``max_steps``.
        steps: Student updates that it ends with.
        evaluations: Of the teacher, for a sample of each batch, in all.
    """

    arguments: tuple[str, ...] = ()
    limit: int = 4
    steps: int = 4
    evaluations: int = 0


# One of each training pattern. With several updates a batch the processes have to agree on their
# number: SFD-v draws 2, 2, 2, 2 and 3 steps, for each of which the teacher makes two.
RUNS = {
    "teacher": Run(),
    "dmd": Run(("--model.accumulate", "2"), evaluations=4),
    "kd": Run(),
    "pd": Run(("--model.updates", "[2,9]"), evaluations=4 * 2),  # the stage changes after 2
    "sfd_v": Run(("--model.accumulate", "2"), limit=10, steps=11, evaluations=2 * 11),
    "ctm": Run(evaluations=4 * 2 * 2),  # two of Heun's steps each time, as its seed has it
    "mean_flow": Run(evaluations=4),
    "dmd2_2_steps": Run(evaluations=4 * (1 + 1 + 2 * 2 + 1)),
}


def run_in_a_shell(command):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "lit_distill", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.parametrize("method", RUNS)
def test_both_end_with_equal_weights(method, tmp_path, world):
    root, expected = tmp_path / "run", RUNS[method]
    options = {"max_steps": expected.limit, "callbacks": [SAVE], "devices": 2}
    row = METHODS[method]
    options["strategy"] = row.strategy
    config = write_config(tmp_path / "run.yaml", root, row, world, **options)
    command = ["fit", "--config", str(config), *expected.arguments]
    # One as a shell starts it, where Lightning starts the second process; it takes its time.
    result = run_in_a_shell(command) if method == "dmd" else run_alone(command, processes=2)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    trained = {name.split(".")[0] for name in first} & {"student", "fake_score", "ema"}
    assert trained == {"student", "ema"} | ({"fake_score"} if "dmd" in method else set())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    # Equal as they were averaged, not as both saw the same: their batches and draws differ.
    drawn = [torch.load(root / f"rank{rank}-draw.pt", weights_only=True) for rank in range(2)]
    assert not torch.equal(*[draw["image"] for draw in drawn])
    assert not torch.equal(*[draw["random"] for draw in drawn])
    last = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == expected.steps
    for name, value in last["state_dict"].items():
        assert torch.equal(value, first[name]), name
    samples = 2 * (8 if row.on_pairs else 100)  # a batch of both
    assert last["spent"]["teacher_evaluations"] == expected.evaluations * samples


def test_two_compute_one_cache_of_latents_and_train_adapters_on_it(tmp_path):
    root = tmp_path / "run"
    folder = text_folder(tmp_path / "teacher")
    trainer = {
        **{"default_root_dir": str(root), "accelerator": "cpu", "devices": 2, "strategy": "ddp"},
        **{"max_steps": 4, "max_epochs": -1, "limit_val_batches": 0, "logger": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "callbacks": [SAVE]},
    }
    model = {
        "class_path": "lit_distill.methods.LatentConsistencyDistillation",
        "init_args": {"teacher": folder, "lora": {"rank": 2, "target_modules": ["to_q", "to_v"]}},
    }
    data = {
        "class_path": "lit_distill.datamodules.LatentTextDataModule",
        "init_args": {
            "source": {"class_path": "lit_distill.datamodules.CaptionedDigits"},
            **{"pipeline": folder, "cache": str(tmp_path / "cache"), "batch_size": 4},
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer, "model": model, "data": data}))
    result = run_alone(["fit", "--config", str(path)], processes=2)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    trained = [name for name in first if name.startswith("student.")]
    assert trained and all("lora" in name for name in trained)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    drawn = [torch.load(root / f"rank{rank}-draw.pt", weights_only=True) for rank in range(2)]
    assert not torch.equal(*[draw["image"] for draw in drawn])


def test_pairs_of_two_are_bit_identical_to_those_of_one(tmp_path, world):
    folder = tmp_path / "pairs"
    writer = {
        "class_path": "lit_distill.callbacks.PairWriter",
        "init_args": {"folder": str(folder)},
    }
    options = {"devices": 2, "strategy": "ddp", "callbacks": [writer]}
    row = METHODS["teacher"]
    path = write_config(tmp_path / "run.yaml", tmp_path / "run", row, world, **options)
    config = yaml.safe_load(path.read_text())
    config["model"]["init_args"] |= {"denoiser": str(world / "teacher"), "steps": 2}
    config["data"]["init_args"] |= {"predict_samples": 88, "predict_batch_size": 30}
    path.write_text(yaml.safe_dump(config))
    result = run_alone(["predict", "--config", str(path)], processes=2)
    assert result.returncode == 0, result.stderr
    ours = {file.name: file.read_bytes() for file in folder.iterdir()}
    theirs = {file.name: file.read_bytes() for file in (world / "pairs").iterdir()}
    assert len(ours) == 4 and ours == theirs
