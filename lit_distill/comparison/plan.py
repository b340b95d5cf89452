"""What a comparison is made of: its settings, and the runs that follow from them.

A method's configuration reads what other runs made by their folders: ``runs/digits/kd`` reads
``runs/digits/teacher/pipeline`` and ``runs/digits/pairs``. So a comparison needs no list of
dependencies: a folder beside a configuration's own, ``runs/digits/<name>``, is made by the run of
that name, whose configuration is an entry or the file ``<name>.yaml`` beside it. In a comparison
all of them move to its own folder.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_distill.comparison.evaluation import Judge

TEACHER = "teacher"
"""The run that methods' configurations mean by ``runs/<dataset>/teacher``."""
AS_CONFIGURED = "as configured"


@dataclass(frozen=True)
class Budget:
    """What each method may spend.

    Attributes:
        amount: How much.
        unit: ``seconds`` of training steps, which a trial turns into updates; student ``updates``;
            ``teacher evaluations`` (times batch rows), with those of stored pairs; or nothing, for
            as much as is configured.
    """

    amount: float = 0
    unit: Literal["", "seconds", "updates", "teacher evaluations"] = ""

    @staticmethod
    def of(text: str) -> "Budget":
        """Read a budget such as ``60 seconds``.

        Raises:
            ValueError: It is none.
        """
        if text == AS_CONFIGURED:
            return Budget()
        match = re.fullmatch(r"([\d_.,]+) (seconds|updates|teacher evaluations)", text.strip())
        try:
            amount = float(match[1].replace(",", "").replace("_", "")) if match else 0.0
        except ValueError:
            amount = 0.0
        if not match or amount <= 0:
            raise ValueError(
                f"budget: {text!r} is none: write a positive number of seconds, updates or teacher "
                f"evaluations, such as '60 seconds', or '{AS_CONFIGURED}'."
            )
        return Budget(amount, match[2])  # type: ignore[arg-type]

    def __str__(self) -> str:
        said = {"seconds": "seconds of training steps", "updates": "student updates"}
        return f"{self.amount:,g} {said.get(self.unit, self.unit)}" if self.unit else AS_CONFIGURED


@dataclass
class Entry:
    """One method of the table.

    Attributes:
        config: Its configuration file, as ``lit-distill fit --config`` takes it.
        label: Its name in the table.
        family: The block of the table that it stands in.
        name: Its run folder, and what ``--only`` calls it; the file's name by default.
        steps: Numbers of steps to evaluate; by default those that it was trained for.
        teacher: Another teacher's configuration, whose samples it is measured against; a flow's
            students are. It is trained as configured.
        overrides: Changes of the configuration, such as ``{model.init_args.lora.rank: 8}``.
    """

    config: str
    label: str
    family: str
    name: str = ""
    steps: list[int] = field(default_factory=list)
    teacher: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.name or Path(self.config).stem
        if any(count < 1 for count in self.steps):
            raise ValueError(f"entry {self.name}: steps {self.steps} must be at least 1.")


@dataclass
class Comparison:
    """The settings of ``configs/compare/*.yaml``.

    Attributes:
        folder: Where all runs and the report are written.
        teacher: Configuration of the teacher, or a diffusers folder or hub id of one that is there.
        entries: The methods.
        evaluation: How all are judged.
        budget: What each method may spend on its training, such as ``60 seconds``, ``500 updates``
            or ``200000 teacher evaluations``. Teachers are trained as configured.
        tuning: How much each method's settings were tuned, in a sentence for the report.
        seed: Seed of all trainings.
        overrides: Changes of all configurations.
        title: Of the report.
    """

    folder: str
    teacher: str
    entries: list[Entry]
    evaluation: Judge
    budget: str = AS_CONFIGURED
    tuning: str = "not stated"
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    title: str = "Comparison"

    def __post_init__(self) -> None:
        Budget.of(self.budget)  # not first after the teacher's training
        names = [entry.name for entry in self.entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names:
            raise ValueError("entries: a comparison needs at least one.")
        if twice:
            raise ValueError(
                f"entries: {', '.join(twice)} stands there more than once: give each a name of its "
                "own (name: ...)."
            )


@dataclass
class Run:
    """One run of the command line in a comparison.

    Attributes:
        name: Its folder's name.
        folder: Its folder.
        config: Its configuration, with all paths in the comparison's folder.
        needs: Names of the runs whose results it reads.
        budgeted: Whether the budget holds for it.
    """

    name: str
    folder: Path
    config: DictConfig
    needs: list[str]
    budgeted: bool

    @property
    def writes_pairs(self) -> bool:
        """Whether it is a ``predict`` that writes pairs, and no training."""
        callbacks = self.config.trainer.get("callbacks") or []
        return any("PairWriter" in str(c.get("class_path")) for c in callbacks)

    @property
    def pipeline(self) -> Path:
        """Where a training leaves its model."""
        return self.folder / "pipeline"


class Plan:
    """All runs of a comparison, by name; a run's configuration is read when it is asked for.

    Args:
        comparison: The settings.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison, self.folder = comparison, Path(comparison.folder)
        self.budget = Budget.of(comparison.budget)
        self.entries = {entry.name: entry for entry in comparison.entries}
        self._runs: dict[str, Run] = {}
        # A teacher that is there already has no run.
        own = comparison.teacher.endswith((".yaml", ".yml"))
        self.ready = None if own else comparison.teacher
        teachers = {entry.teacher for entry in comparison.entries if entry.teacher}
        self._teachers = {Path(path).stem: path for path in teachers}
        if own:
            self._alias = Path(comparison.teacher).stem
            self._teachers[TEACHER] = comparison.teacher
        else:
            self._alias = TEACHER

    def teacher_of(self, entry: Entry) -> tuple[str, str]:
        """Name of an entry's teacher, and its folder or hub id."""
        if entry.teacher is not None:
            name = self._canonical(Path(entry.teacher).stem)
            return name, str(self.folder / name / "pipeline")
        return TEACHER, self.ready or str(self.folder / TEACHER / "pipeline")

    def is_teacher(self, name: str) -> bool:
        """Whether a run is the teacher of some entry, which the methods' costs leave out."""
        return name in self._teachers

    def run(self, name: str) -> Run:
        """A run by its name.

        Raises:
            FileNotFoundError: There is no configuration for it.
            ValueError: Its configuration cannot be used.
        """
        if name not in self._runs:
            if name in self.entries:
                entry = self.entries[name]
                self._add(name, Path(entry.config), entry.overrides, budgeted=True)
            else:
                self._add(name, Path(self._teachers[name]), {}, budgeted=False)
        return self._runs[name]

    def order(self, name: str) -> list[Run]:
        """All runs that one takes, itself last."""
        found: dict[str, Run] = {}

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                raise ValueError(f"These runs read each other: {' -> '.join([*path, name])}.")
            run = self.run(name)
            for need in run.needs:
                visit(need, (*path, name))
            found[name] = run

        visit(name, ())
        return list(found.values())

    def _canonical(self, name: str) -> str:
        return TEACHER if name == self._alias else name

    def _add(self, name: str, path: Path, overrides: dict[str, Any], budgeted: bool) -> None:
        config = load(path)
        for key, value in {**self.comparison.overrides, **overrides}.items():
            OmegaConf.update(config, key, value, force_add=True)
        root = OmegaConf.select(config, "trainer.default_root_dir")
        if root is None:
            raise ValueError(f"{path} names no run folder: give it a trainer.default_root_dir.")
        shelf = Path(root).parent
        if not shelf.parts:
            raise ValueError(f"{path}: trainer.default_root_dir must lie in a folder of runs.")
        needs: dict[str, None] = {}

        def moved(text: str) -> str:
            parts = Path(text).parts
            inside = parts[: len(shelf.parts)] == shelf.parts and len(parts) > len(shelf.parts)
            if not inside or Path(text) == Path(root):
                return text
            other = self._canonical(parts[len(shelf.parts)])
            if other == TEACHER and self.ready is not None:
                return self.ready
            if other != "cache":  # of the evaluation, which no run makes
                needs[other] = None
            return str(self.folder.joinpath(other, *parts[len(shelf.parts) + 1 :]))

        config = DictConfig(_mapped(OmegaConf.to_container(config), moved))
        folder = self.folder / name
        config.trainer.default_root_dir = str(folder)
        config.seed_everything = self.comparison.seed
        if OmegaConf.select(config, "trainer.enable_progress_bar") is None:
            config.trainer.enable_progress_bar = False  # it would fill the log
        for need in needs:
            self._provide(need, path, root)
        run = Run(name, folder, config, list(needs), budgeted)
        run.budgeted = budgeted and not run.writes_pairs
        self._runs[name] = run

    def _provide(self, name: str, reader: Path, root: str) -> None:
        """Make sure that there is a configuration for what a run reads."""
        if name in self._runs or name in self.entries or name in self._teachers:
            return
        beside = reader.with_name(f"{name}.yaml")
        if not beside.is_file():
            raise FileNotFoundError(
                f"{reader} reads {Path(root).parent / name}, but there is neither an entry {name} "
                f"nor a configuration {beside} that would make it."
            )
        self._add(name, beside, {}, budgeted=True)


def load(path: Path) -> DictConfig:
    """A configuration file, with its interpolations as they stand there.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no mapping in YAML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration {path}.")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(config, DictConfig) or "trainer" not in config:
        raise ValueError(f"{path} is no configuration of a run: it has no key trainer.")
    return config


LENGTHS = (
    *("max_steps", "val_check_interval", "every_n_train_steps", "every_n_steps"),
    *("updates", "stage_updates", "total_steps", "T_max", "total_iters", "milestones"),
)
"""Settings that count updates (or batches, which are proportional to them)."""


def shortened(config: DictConfig, updates: int) -> DictConfig:
    """The same configuration for another number of updates: every length in it is scaled alike.

    Learning-rate schedules, stages, and the intervals of validation, checkpoints and pictures.
    What is interpolated from ``trainer.max_steps`` follows by itself. The epochs are unlimited.
    There is no validation where no checkpoint is chosen by it.

    Args:
        config: A training's configuration.
        updates: Its new ``trainer.max_steps``.

    Raises:
        ValueError: It has no ``trainer.max_steps``, or more stages than updates.
    """
    full = OmegaConf.select(config, "trainer.max_steps")
    if not isinstance(full, int) or full < 1:
        raise ValueError("A budget needs a configuration with trainer.max_steps to scale.")
    scale = updates / full

    def scaled(key: Any, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: scaled(k, v) for k, v in value.items()}
        if key == "updates" and isinstance(value, list):
            return _split(value, round(sum(value) * scale))
        if isinstance(value, list):
            return [scaled(key, v) for v in value]
        if key not in LENGTHS or not isinstance(value, int) or isinstance(value, bool):
            return value
        length = max(1, int(value * scale))
        # A batch may be 2, 3 or 4 updates, and a checkpoint waits for a multiple that it meets.
        return length - length % 12 if key == "every_n_train_steps" and length > 12 else length

    made = DictConfig(scaled(None, OmegaConf.to_container(config)))
    made.trainer.max_steps, made.trainer.max_epochs = updates, -1
    callbacks = made.trainer.get("callbacks") or []
    if not any((c.get("init_args") or {}).get("monitor") for c in callbacks):
        made.trainer.limit_val_batches = 0  # nothing is chosen by it: all are judged alike after
    return made


def _split(lengths: list[int], total: int) -> list[int]:
    """Stages of the same shares that add up to ``total``, each of at least 1."""
    if total < len(lengths):
        raise ValueError(
            f"The budget of {total} updates is too small for {len(lengths)} stages: give more."
        )
    spare = total - len(lengths)  # one for each, the rest by shares
    ends = [spare * sum(lengths[: i + 1]) // sum(lengths) for i in range(len(lengths))]
    return [1 + end - start for start, end in zip([0, *ends], ends, strict=False)]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same nested lists and mappings with all texts changed."""
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
