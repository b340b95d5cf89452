"""The folder of one run: what it holds, where it is gone on from, and how it is cleared."""

import shutil
from pathlib import Path

LAST = Path("checkpoints") / "last.ckpt"
BEST = Path("checkpoints") / "best.ckpt"
CONFIG = "config.yaml"
_STAGES = "stage-*/model_index.json"  # exported on the way, see ExportPipeline
_AVERAGES = "pipeline-ema-*/model_index.json"  # further ones, see ExportPipeline
_RESULTS = ("checkpoints/*.ckpt", "pipeline/*", _STAGES, "metrics.json")
_PARTS = (
    *("checkpoints", "pipeline", "adapter", "samples", "metrics.json", "cost.json"),
    *("comparison.png", "hparams.yaml"),
)
_EVENTS = "events.out.tfevents.*"


def holds_run(root: Path) -> bool:
    """Whether the folder has results of a run: a checkpoint, an exported pipeline or metrics.

    Args:
        root: The run folder; it need not exist.
    """
    return any(True for pattern in _RESULTS for _ in root.glob(pattern))


def check_fit(root: Path, ckpt_path: str | None, overwrite: bool) -> None:
    """Refuse a fit that would write over the results of another run.

    Args:
        root: The run folder.
        ckpt_path: What ``--ckpt_path`` says: ``last`` and every path go on from a checkpoint.
        overwrite: What ``--overwrite`` says.

    Raises:
        ValueError: The folder holds a run and neither option is given, or both are.
        FileNotFoundError: The folder holds a run, but no checkpoint ``last``.
    """
    if overwrite and ckpt_path is not None:
        raise ValueError(
            f"--overwrite true removes the run in {root} and --ckpt_path {ckpt_path} goes on from "
            "a checkpoint: give one of them."
        )
    if overwrite or not holds_run(root):
        return
    if ckpt_path is None:
        raise ValueError(
            f"{root} holds a run already: go on with it (--ckpt_path last), replace it "
            "(--overwrite true) or choose another folder (--trainer.default_root_dir)."
        )
    if ckpt_path == "last" and not (root / LAST).exists():
        raise FileNotFoundError(
            f"{root / LAST} is missing, so that the run cannot go on: name a checkpoint "
            "(--ckpt_path PATH) or start again (--overwrite true)."
        )


def resolve_checkpoint(root: Path, ckpt_path: str | None, *, fit: bool) -> str | None:
    """The checkpoint that a command starts from, or None.

    Args:
        root: The run folder.
        ckpt_path: What ``--ckpt_path`` says: None, ``last``, ``best`` or a path.
        fit: Whether this is a fit, which starts from scratch where nothing else is asked for or
            where there is no ``last`` yet (so that one command both starts and goes on). The other
            commands take ``best``, else ``last``, else the model as configured.

    Returns:
        The path, or None for the model as configured.

    Raises:
        FileNotFoundError: The checkpoint that was asked for is missing.
    """
    named = {"last": root / LAST, "best": root / BEST}
    if ckpt_path is None:
        found = [] if fit else [named[name] for name in ("best", "last") if named[name].exists()]
        return str(found[0]) if found else None
    if "://" in ckpt_path:
        return ckpt_path
    path = named.get(ckpt_path, Path(ckpt_path))
    if path.exists():
        return str(path)
    if fit and ckpt_path == "last":
        return None
    raise FileNotFoundError(f"--ckpt_path {ckpt_path}: there is no checkpoint {path}.")


def written(root: Path) -> list[Path]:
    """What a run wrote into its folder, apart from ``config.yaml``, which every fit renews.

    Args:
        root: The run folder.
    """
    parts = (root / name for name in _PARTS)
    found = [path for path in parts if path.exists()]
    exported = sorted(path.parent for glob in (_STAGES, _AVERAGES) for path in root.glob(glob))
    return found + exported + sorted(root.glob(_EVENTS))


def remove(paths: list[Path]) -> None:
    """Remove files and folders."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
