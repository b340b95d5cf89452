"""``lit-distill compare``: one teacher, many methods, one budget, one report."""

import os
import signal
import traceback
import warnings
from argparse import ArgumentError
from types import FrameType
from typing import Any

from jsonargparse import ArgumentParser

import lit_distill.datamodules
import lit_distill.metrics  # noqa: F401  (so that classes are known by their short names)
from lit_distill.commands.errors import one_line
from lit_distill.comparison.evaluation import Evaluator
from lit_distill.comparison.plan import Comparison, Entry, Plan
from lit_distill.comparison.report import Result, write_report
from lit_distill.comparison.training import RunError, Workshop, finished, spent_on

_DESCRIPTION = """\
Train and evaluate all methods of a comparison, those that are done left out, and write
<folder>/report/: index.html, report.md and results.json. Given again, it goes on where it stopped.
"""


def run_compare(args: list[str]) -> int:
    """Make a comparison.

    Args:
        args: The command line after ``compare``.

    Returns:
        The exit status: 0, or 1 where an entry failed; the report says why.

    Raises:
        argparse.ArgumentError: The command line or the file is wrong.
        ValueError: A setting is.
        FileNotFoundError: A file is missing.
    """
    comparison, only, overwrite = _read(args)
    unknown = sorted({*only} - {entry.name for entry in comparison.entries})
    if unknown:
        names = ", ".join(entry.name for entry in comparison.entries)
        raise ValueError(f"--only {' '.join(unknown)}: there is no such entry; there are {names}.")
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _compare(comparison, only, overwrite)
    finally:
        signal.signal(signal.SIGTERM, before)


def _compare(comparison: Comparison, only: list[str], overwrite: bool) -> int:
    plan = Plan(comparison)
    # Before anything slow: are all configurations there, and do they fit together?
    for entry in comparison.entries:
        plan.order(entry.name)
    workshop = Workshop(plan, overwrite)
    evaluator = Evaluator(comparison.evaluation, plan.folder)
    results: list[Result] = []
    teachers: dict[str, Result] = {}
    for number, entry in enumerate(comparison.entries, 1):
        if only and entry.name not in only:
            results.append(_kept(plan, workshop, evaluator, entry))
            continue
        print(f"[{number}/{len(comparison.entries)}] {entry.name}: {entry.label}", flush=True)
        results.append(_result(plan, workshop, evaluator, entry, teachers))
    if only:
        for entry in comparison.entries:
            teacher, folder = plan.teacher_of(entry)
            if teacher not in teachers and any(r.entry is entry and r.rows for r in results):
                teachers[teacher] = _teacher(evaluator, teacher, folder)
    table = write_report(comparison, plan, evaluator, [*teachers.values()], results)
    failed = [result for result in results if result.error and not result.left_out]
    print(f"\n{table}\n")
    for result in failed:
        print(f"{result.name} failed: {result.error}")
    print(f"Report: {plan.folder / 'report' / 'index.html'}")
    return 1 if failed else 0


def _read(args: list[str]) -> tuple[Comparison, list[str], bool]:
    """The command line and its file."""
    parser = ArgumentParser(
        prog="lit-distill compare", description=_DESCRIPTION, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="a file such as configs/compare/*.yaml")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="train and evaluate these entries"
    )
    parser.add_argument(
        "--overwrite",
        type=bool,
        default=False,
        help="make runs anew that were made with other settings",
    )
    parser.add_class_arguments(Comparison, None)
    if args and not args[0].startswith("-"):
        args = ["--config", *args]
    if not any(arg.startswith(("--config", "-h", "--help", "--print")) for arg in args):
        raise ArgumentError(
            None, "a file is missing: lit-distill compare configs/compare/digits.yaml"
        )
    given = parser.instantiate_classes(parser.parse_args(args))
    options: dict[str, Any] = {
        key: given[key] for key in Comparison.__dataclass_fields__ if key in given
    }
    return Comparison(**options), list(given.only or []), bool(given.overwrite)


def _result(
    plan: Plan, workshop: Workshop, evaluator: Evaluator, entry: Entry, teachers: dict[str, Result]
) -> Result:
    """Train and evaluate one entry; what goes wrong becomes a sentence."""
    result = Result(entry.name, entry)
    try:
        teacher, folder = plan.teacher_of(entry)
        if teacher != "teacher" or plan.ready is None:
            workshop.make(teacher)
        if teacher not in teachers:
            teachers[teacher] = _teacher(evaluator, teacher, folder)
        workshop.make(entry.name)
        _evaluate(plan, evaluator, entry, result)
    except RunError as error:
        result.error = one_line(error)
    except Exception as error:  # whatever it is, the other entries go on
        if os.environ.get("LIT_DISTILL_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        result.error = f"its evaluation failed: {one_line(error)}"
    if result.error:
        print(f"{entry.name}: {result.error}", flush=True)
    return result


def _kept(plan: Plan, workshop: Workshop, evaluator: Evaluator, entry: Entry) -> Result:
    """An entry that is not asked for: what was found out about it before."""
    result = Result(entry.name, entry, left_out=True)
    try:
        run = plan.run(entry.name)
        if (run.folder / "evaluation.json").is_file() and finished(run):
            changed = workshop.changed(run)
            if changed:
                raise ValueError(f"its run has other settings ({changed})")
            _evaluate(plan, evaluator, entry, result)
    except Exception as error:
        result.error = one_line(error)
    return result


def _evaluate(plan: Plan, evaluator: Evaluator, entry: Entry, result: Result) -> None:
    run, (_, teacher) = plan.run(entry.name), plan.teacher_of(entry)
    key = {
        "model": evaluator.load(run.pipeline).fingerprint(),
        "teacher": evaluator.load(teacher).fingerprint(),
        "steps": entry.steps,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result.rows, result.images = evaluator.kept(
            entry.name, key, lambda: evaluator.student(run.folder, entry.steps, teacher)
        )
    needed = [need for need in plan.order(entry.name)[:-1] if not plan.is_teacher(need.name)]
    result.spent, result.prepared = spent_on(run), [spent_on(need) for need in needed]


def _teacher(evaluator: Evaluator, name: str, folder: str) -> Result:
    result = Result(name, None)
    key = {"teacher": evaluator.load(folder).fingerprint()}

    def measured() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        print(f"{name}: its samples, and the best solver at few evaluations", flush=True)
        return evaluator.teacher(folder)

    result.rows, result.images = evaluator.kept(name, key, measured)
    return result


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop as by Ctrl-C, so that a training in progress is stopped too."""
    raise KeyboardInterrupt
