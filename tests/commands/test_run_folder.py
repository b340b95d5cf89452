from pathlib import Path

import pytest

from lit_distill.commands import run_folder


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return root


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], False),
        (["config.yaml", "events.out.tfevents.1", "notes.txt"], False),
        (["checkpoints/last.ckpt"], True),
        (["pipeline/model_index.json"], True),
        (["metrics.json"], True),
        (["stage-4-steps/model_index.json"], True),
        (["mine/model_index.json", "stage-notes/a.txt"], False),
    ],
)
def test_results_make_a_run(tmp_path: Path, names: list[str], expected: bool) -> None:
    assert run_folder.holds_run(make(tmp_path, *names)) is expected


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert not run_folder.holds_run(tmp_path / "none")


@pytest.mark.parametrize(
    ("names", "best_of"),
    [
        (["checkpoints/last.ckpt", "checkpoints/best.ckpt"], "checkpoints/best.ckpt"),
        (["checkpoints/last.ckpt"], "checkpoints/last.ckpt"),
        ([], None),
    ],
)
def test_a_test_takes_best_then_last_then_the_model_as_configured(
    tmp_path: Path, names: list[str], best_of: str | None
) -> None:
    root = make(tmp_path, *names)
    expected = None if best_of is None else str(root / best_of)
    assert run_folder.resolve_checkpoint(root, None, fit=False) == expected
    assert run_folder.resolve_checkpoint(root, None, fit=True) is None


def test_names_and_paths_of_checkpoints(tmp_path: Path) -> None:
    root = make(tmp_path, "checkpoints/last.ckpt", "checkpoints/best.ckpt", "other.ckpt")
    for name in ("last", "best"):
        expected = str(root / "checkpoints" / f"{name}.ckpt")
        assert run_folder.resolve_checkpoint(root, name, fit=False) == expected
    other = str(root / "other.ckpt")
    assert run_folder.resolve_checkpoint(root, other, fit=True) == other
    assert run_folder.resolve_checkpoint(root, "s3://a/b.ckpt", fit=True) == "s3://a/b.ckpt"


def test_a_missing_checkpoint_is_an_error_except_for_a_fit_that_begins(tmp_path: Path) -> None:
    assert run_folder.resolve_checkpoint(tmp_path, "last", fit=True) is None
    for fit, name in [(False, "last"), (True, "best"), (True, "nope.ckpt"), (False, "nope.ckpt")]:
        with pytest.raises(FileNotFoundError, match=f"--ckpt_path {name}: there is no checkpoint"):
            run_folder.resolve_checkpoint(tmp_path, name, fit=fit)


def test_what_a_run_wrote_is_removed_and_nothing_else(tmp_path: Path) -> None:
    written = [
        "checkpoints/last.ckpt",
        "pipeline/unet/config.json",
        "stage-4-steps/model_index.json",
        "stage-4-steps/unet/config.json",
        "pipeline-ema-0.99/model_index.json",
        "adapter/adapter_config.json",
        "samples/step-000001.png",
        "metrics.json",
        "comparison.png",
        "hparams.yaml",
        "events.out.tfevents.1",
    ]
    kept = ["notes.txt", "shard-00000.safetensors", "config.yaml", "mine/model_index.json"]
    root = make(tmp_path, *written, *kept)
    run_folder.remove(run_folder.written(root))
    left = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(kept)
