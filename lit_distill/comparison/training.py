"""Makes the runs of a comparison by the command line, one process each, and only once."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_distill.callbacks.run_cost import COST
from lit_distill.commands import run_folder
from lit_distill.comparison.plan import Budget, Plan, Run, shortened
from lit_distill.datamodules.pairs_folder import MANIFEST, read_manifest

GIVEN = "compare.yaml"
"""The configuration that a run was given: it can be repeated with it alone."""
LOG = "log.txt"
_TRIAL = "trial"
_TIMED = "trial.json"  # what the trial found, and what it was made with
_TRIAL_UPDATES, _TRIAL_SECONDS = 24, 20
_PATIENCE = 30  # seconds that a stopped process has to write its checkpoint


class RunError(ValueError):
    """A run that failed; the message is one sentence."""


@dataclass(frozen=True)
class Spent:
    """What a run cost; None where it is not known.

    Attributes:
        updates: Student updates.
        seconds: Of training steps, or of the writing of pairs.
        teacher_evaluations: Times batch rows.
        peak_memory_mb: Largest memory of the process.
    """

    updates: int | None = None
    seconds: float | None = None
    teacher_evaluations: int | None = None
    peak_memory_mb: float | None = None


class Workshop:
    """Makes runs, those that are needed first.

    Args:
        plan: All runs.
        overwrite: Make runs anew that were made with other settings; else that is an error.
    """

    def __init__(self, plan: Plan, overwrite: bool = False) -> None:
        self.plan, self.overwrite = plan, overwrite
        self._failed: dict[str, str] = {}
        self._made: set[str] = set()  # in this process
        self._checked: set[str] = set()

    def make(self, name: str) -> None:
        """Make a run and what it reads, unless they are there.

        Raises:
            RunError: One of them failed, or was made with other settings.
        """
        for run in self.plan.order(name):
            if run.name in self._failed:
                reason = self._failed[run.name]
                raise RunError(reason if run.name == name else f"it needs {run.name}: {reason}")
            try:
                self._make_one(run)
            except (ValueError, OSError) as error:
                self._failed[run.name] = str(error)
                raise RunError(
                    str(error) if run.name == name else f"it needs {run.name}: {error}"
                ) from error

    def changed(self, run: Run) -> str:
        """The first setting in which a run was made otherwise than it would be now, or nothing."""
        given = run.folder / GIVEN
        if not given.is_file():
            return ""
        # Not timed anew for this: with the old settings back, a run that is refused fits again.
        trial = self._timed_otherwise(run)
        return trial or _difference(_plain(OmegaConf.load(given)), _plain(self._within_budget(run)))

    def _make_one(self, run: Run) -> None:
        if run.name in self._checked:
            return
        given, anew = run.folder / GIVEN, False
        if given.is_file():
            changed = self.changed(run)
            stale = sorted(self._made.intersection(run.needs)) if finished(run) else []
            if changed or stale:
                why = changed or f"{', '.join(stale)} was made anew since"
                if not self.overwrite:
                    raise RunError(
                        f"the run in {run.folder} has other settings ({why}): make it anew with "
                        "--overwrite true, or choose another --folder"
                    )
                anew = True
        found = finished(run) and not given.is_file()
        if found and run.budgeted and self.plan.budget.unit:
            raise RunError(
                f"the run in {run.folder} was not made within this budget: choose another --folder"
            )
        if finished(run) and not anew:
            self._checked.add(run.name)
            return
        config = self._within_budget(run)
        if anew:
            self._clear(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        _write(given, OmegaConf.to_yaml(config))
        what = "writing pairs" if run.writes_pairs else f"{config.trainer.max_steps} updates"
        print(f"{run.name}: {what} (log: {run.folder / LOG})", flush=True)
        if run.writes_pairs:
            command(["predict", "--config", str(given)], run.folder / LOG)
        else:
            going_on = (run.folder / run_folder.LAST).is_file()
            how = ["--ckpt_path", "last"] if going_on else ["--overwrite", "true"]
            command(["fit", "--config", str(given), *how], run.folder / LOG)
        if not finished(run):
            raise RunError(f"it ended without a result: see {run.folder / LOG}")
        self._made.add(run.name)
        self._checked.add(run.name)

    def _clear(self, run: Run) -> None:
        """Remove what a run with other settings left."""
        pairs = [*run.folder.glob("shard-*.safetensors*"), run.folder / MANIFEST]
        run_folder.remove([*run_folder.written(run.folder), *pairs])

    # --- The budget -----------------------------------------------------------------------------

    def _within_budget(self, run: Run) -> DictConfig:
        """The run's configuration, shortened (or lengthened) to the budget."""
        budget = self.plan.budget
        if not run.budgeted or not budget.unit:
            return run.config
        if budget.unit == "updates":
            return shortened(run.config, int(budget.amount))
        return shortened(run.config, self._updates_for(run, budget))

    def _updates_for(self, run: Run, budget: Budget) -> int:
        """How many updates fit into seconds or evaluations, by a trial that is kept."""
        record = run.folder / _TIMED
        if not record.is_file() or self._timed_otherwise(run):
            found = {**self._tried(run), "settings": self._settings(run)}
            _write(record, json.dumps(found, indent=1) + "\n")
        trial = json.loads(record.read_text())
        if budget.unit == "seconds":
            return max(1, round(budget.amount / trial["seconds_per_update"]))
        stored = sum(
            spent_on(self.plan.run(need)).teacher_evaluations or 0
            for need in run.needs
            if self.plan.run(need).writes_pairs
        )
        left = budget.amount - stored
        if left < max(1, trial["evaluations_per_update"]):
            raise RunError(
                f"the budget of {budget} leaves nothing: its stored pairs alone took {stored:,}"
            )
        if not trial["evaluations_per_update"]:  # it asks the teacher nothing: as configured
            return int(run.config.trainer.max_steps)
        return int(left // trial["evaluations_per_update"])

    def _settings(self, run: Run) -> dict[str, Any]:
        """All that a trial depends on: the run's own configuration and those of what it reads."""
        return {each.name: _plain(each.config) for each in self.plan.order(run.name)}

    def _timed_otherwise(self, run: Run) -> str:
        """The first setting in which the kept trial was made otherwise, or nothing."""
        record = run.folder / _TIMED
        if self.plan.budget.unit in ("", "updates") or not record.is_file():
            return ""  # no trial is asked
        return _difference(json.loads(record.read_text()).get("settings"), self._settings(run))

    def _tried(self, run: Run) -> dict[str, float]:
        """Seconds and teacher evaluations of an update, measured on a few."""
        folder = run.folder / _TRIAL
        config = shortened(run.config, max(_TRIAL_UPDATES, _stages(run.config)))
        config.trainer.default_root_dir = str(folder)
        config.trainer.limit_val_batches = 0
        config.trainer.max_time = {"seconds": _TRIAL_SECONDS}
        config.trainer.callbacks = []
        _write(folder / GIVEN, OmegaConf.to_yaml(config))
        print(f"{run.name}: timing an update", flush=True)
        try:
            arguments = ["fit", "--config", str(folder / GIVEN), "--overwrite", "true"]
            command(arguments, run.folder / LOG)
            cost = json.loads((folder / COST).read_text())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return {
            "seconds_per_update": cost["seconds_per_update"],
            "evaluations_per_update": cost["teacher_evaluations"] / cost["student_updates"],
        }


def finished(run: Run) -> bool:
    """Whether a run has left its result; one that a comparison began has also written its cost."""
    if run.writes_pairs:
        try:
            manifest = read_manifest(run.folder)
        except (FileNotFoundError, ValueError):
            return False
        return manifest.complete and not manifest.missing(run.folder)
    done = (run.pipeline / "model_index.json").is_file()
    return done and ((run.folder / COST).is_file() or not (run.folder / GIVEN).is_file())


def spent_on(run: Run) -> Spent:
    """What a finished run cost."""
    try:
        cost: dict[str, Any] = json.loads((run.folder / COST).read_text())
    except (OSError, ValueError):
        cost = {}
    if run.writes_pairs:
        manifest = read_manifest(run.folder)
        evaluations: int | None = manifest.nfe * manifest.num_pairs
    else:
        evaluations = cost.get("teacher_evaluations")
    return Spent(
        cost.get("student_updates"),
        cost.get("seconds", cost.get("train_seconds")),
        evaluations,
        cost.get("peak_memory_mb"),
    )


def command(arguments: list[str], log: Path) -> None:
    """Run ``lit-distill`` in a process of its own; what it prints goes to the end of a log.

    Raises:
        RunError: It failed; the message is what it said last.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ lit-distill {' '.join(arguments)}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "lit_distill", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            status = process.wait()
        except BaseException:  # Ctrl-C reaches both processes, a signal to this one does not
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if status:
        with log.open(encoding="utf-8", errors="replace") as file:
            file.seek(begin)
            raise RunError(_last_words(file.read(), status, log))


def _last_words(text: str, status: int, log: Path) -> str:
    """Why a process ended, in a sentence."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("lit-distill: error: "):
            return line.removeprefix("lit-distill: error: ")
    if status < 0:
        return f"its process was ended by signal {-status} (see {log})"
    said = f": {lines[-1]}" if lines else ""
    return f"its process ended with status {status}{said} (see {log})"


def _stages(config: DictConfig) -> int:
    """Updates that a configuration needs at least: one a stage."""
    updates = OmegaConf.select(config, "model.init_args.updates")
    return 1 if updates is None or isinstance(updates, int) else len(updates)


def _difference(before: Any, now: Any) -> str:
    """The first setting in which two configurations differ, or nothing."""
    old, new = _flat(before), _flat(now)
    for key in [*old, *new]:
        if old.get(key) != new.get(key):
            return f"{key}: {old.get(key, 'absent')}, now {new.get(key, 'absent')}"
    return ""


def _plain(config: Any) -> Any:
    """A configuration as nested lists and mappings, with its interpolations as they stand there."""
    return OmegaConf.to_container(config)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(_flat(item, f"{prefix}.{key}".lstrip(".")))
    return flat


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
