"""``lit-distill compare`` from its file to its report, on methods that train in a second."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from ended import Command, Ended
from PIL import Image
from small_comparison import write_comparison

from lit_distill.comparison import training
from lit_distill.main import main

Calls = list[list[str]]
IN_A_PROCESS = training.command


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The commands that a comparison gives, which run here and not in processes of their own."""
    made: Calls = []

    def here(arguments: list[str], log: Path) -> None:
        made.append([arguments[0], Path(arguments[2]).parent.name])
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            status = main(arguments)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(said.getvalue())
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise training.RunError(training._last_words(said.getvalue(), status, log))

    monkeypatch.setattr(training, "command", here)
    return made


@pytest.fixture(autouse=True)
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing takes a second a row, and tests/metrics/test_cost.py is about it: no two are alike."""
    numbers = itertools.count(1)
    monkeypatch.setattr(
        "lit_distill.metrics.cost._median_seconds", lambda run, device: next(numbers) / 1e3
    )


def compare(command: Command, path: Path, *more: object) -> Ended:
    return command("compare", path, *more)


def times(folder: Path) -> dict[Path, int]:
    """When every file of the runs was written."""
    files = [p for p in folder.rglob("*") if p.is_file() and "report" not in p.parts]
    return {path: path.stat().st_mtime_ns for path in files}


class TestReport:
    def test_a_failing_entry_does_not_stop_the_others(
        self, command: Command, calls: Calls, tmp_path: Path
    ) -> None:
        path = write_comparison(tmp_path, "broken", "cd", "second")
        ended = compare(command, path)
        assert ended.status == 1
        made = [name for _, name in calls]
        assert made == ["broken", "cd", "sfd", "second"]  # the second stage brings its first
        report = tmp_path / "compared" / "report"
        table = (report / "report.md").read_text()
        assert re.search(r"\| all \| BROKEN \| .*num_nodes", table)
        assert re.search(r"\| all \| CD \| 1 \|", table)
        assert re.search(r"\| all \| SECOND \| 1 \|", table)
        assert "Budget of each method: 4 student updates" in table
        rows = json.loads((report / "results.json").read_text())
        second = next(row for row in rows if row["name"] == "second" and "nfe" in row)
        assert second["spent"]["updates"] == 4
        # Of the student of SFD, 2 steps for each of 16 samples; and its own training before that.
        assert second["spent"]["teacher_evaluations"] == 4 * 16 * 2
        assert second["prepared"][0]["teacher_evaluations"] > 0
        assert second["spent"]["peak_memory_mb"] > 100
        low, high = second["fd_teacher_interval"]
        assert low < second["fd_teacher"] < high
        self.check_page((report / "index.html").read_text(), report)

    def test_without_intervals(self, command: Command, calls: Calls, tmp_path: Path) -> None:
        path = write_comparison(tmp_path, "cd")
        given = yaml.safe_load(path.read_text())
        given["evaluation"]["resamples"] = 0
        path.write_text(yaml.safe_dump(given))
        ended = compare(command, path)
        assert ended.status == 0, ended.err
        report = tmp_path / "compared" / "report"
        rows = json.loads((report / "results.json").read_text())
        assert all(row.get("fd_teacher_interval") is None for row in rows)
        for page in ("report.md", "index.html"):
            text = (report / page).read_text()
            assert re.search(r"\| CD \||>CD<", text)
            assert not re.search(r"\d \[|bootstrap|[ >]None[ <]", text)
        assert (report / "distances.png").is_file()

    def check_page(self, page: str, report: Path) -> None:
        """Self-contained: nothing that a browser would fetch."""
        assert not re.search(r"""(src|href)=["'](?!data:)""", page)
        assert "@import" not in page
        assert "<script" not in page
        assert page.count("data:image/png;base64,") == 2
        assert "BROKEN" in page
        with Image.open(report / "samples.png") as samples:
            assert samples.width > samples.height / 3
        assert (report / "distances.png").is_file()

    def test_a_teacher_of_its_own_is_trained_and_measured(
        self, command: Command, calls: Calls, tmp_path: Path
    ) -> None:
        path = write_comparison(tmp_path, "cd", "second")
        given = yaml.safe_load(path.read_text())
        given["entries"][1]["teacher"] = str(tmp_path / "configs" / "sfd.yaml")
        path.write_text(yaml.safe_dump(given))
        assert compare(command, path).status == 0
        table = (tmp_path / "compared/report/report.md").read_text()
        assert re.search(r"\| teacher \| sfd, heun, 2 steps \|", table)
        assert "SECOND: `sfd`" in table
        kept = yaml.safe_load((tmp_path / "compared/sfd/compare.yaml").read_text())
        assert kept["trainer"]["max_steps"] == 8  # as configured, and not the budget's


class TestRestart:
    def test_what_is_done_is_not_repeated(
        self, command: Command, calls: Calls, tmp_path: Path
    ) -> None:
        path = write_comparison(tmp_path, "cd", "sfd")
        first = compare(command, path)
        assert first.status == 0, first.err
        before = times(tmp_path / "compared")
        calls.clear()
        again = compare(command, path)
        assert again.status == 0
        assert calls == []
        assert times(tmp_path / "compared") == before
        assert again.out.split("| family |")[1] == first.out.split("| family |")[1]

    def test_an_interrupted_one_goes_on(
        self,
        command: Command,
        calls: Calls,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path = write_comparison(tmp_path, "cd", "sfd", budget="as configured")
        with monkeypatch.context() as patch:
            stop_at(patch, "sfd", step=4)
            ended = compare(command, path)
        assert ended.status == 130
        assert calls == [["fit", "cd"], ["fit", "sfd"]]
        done = times(tmp_path / "compared" / "cd")
        assert not (tmp_path / "compared/sfd/pipeline").exists()
        log: Calls = []

        def watched(arguments: list[str], file: Path) -> None:
            log.append(arguments)
            IN_A_PROCESS(arguments, file)

        monkeypatch.setattr(training, "command", watched)
        assert compare(command, path).status == 0
        assert [Path(arguments[2]).parent.name for arguments in log] == ["sfd"]
        assert log[0][-2:] == ["--ckpt_path", "last"]
        cost = json.loads((tmp_path / "compared/sfd/cost.json").read_text())
        assert cost["student_updates"] == 8
        assert cost["updates_here"] < 8  # it went on, in a process of its own
        assert times(tmp_path / "compared" / "cd") == done

    def test_other_settings_are_refused_unless_told(
        self, command: Command, calls: Calls, tmp_path: Path
    ) -> None:
        path = write_comparison(tmp_path, "cd")
        assert compare(command, path).status == 0
        calls.clear()
        ended = compare(command, path, "--budget", "6 updates")
        assert ended.status == 1
        assert calls == []
        assert "has other settings (trainer.max_steps: 4, now 6)" in ended.out
        assert "--overwrite true" in ended.out
        assert compare(command, path, "--budget", "6 updates", "--overwrite", "true").status == 0
        cost = json.loads((tmp_path / "compared/cd/cost.json").read_text())
        assert cost["student_updates"] == cost["updates_here"] == 6


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """Interrupt a run as Ctrl-C does, after so many updates."""
    from lit_distill.callbacks import RunCost

    real = RunCost.on_train_batch_end

    def interrupting(self, trainer, module, *args, **kwargs) -> None:
        real(self, trainer, module, *args, **kwargs)
        if Path(trainer.default_root_dir).name == name and trainer.global_step >= step:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunCost, "on_train_batch_end", interrupting)


class TestBudgets:
    def test_seconds_become_updates_by_one_trial(
        self, command: Command, calls: Calls, tmp_path: Path
    ) -> None:
        path = write_comparison(tmp_path, "cd", budget="0.5 seconds")
        assert compare(command, path).status == 0
        assert [name for _, name in calls] == ["trial", "cd"]
        folder = tmp_path / "compared" / "cd"
        trial = json.loads((folder / "trial.json").read_text())
        given = yaml.safe_load((folder / "compare.yaml").read_text())["trainer"]["max_steps"]
        assert given == max(1, round(0.5 / trial["seconds_per_update"]))
        assert not (folder / "trial").exists()
        calls.clear()
        assert compare(command, path).status == 0  # a second trial would give another number
        assert calls == []

    def test_other_settings_are_timed_anew(
        self, command: Command, calls: Calls, tmp_path: Path
    ) -> None:
        path = write_comparison(tmp_path, "second", budget="0.1 seconds")
        assert compare(command, path).status == 0
        first = tmp_path / "configs" / "sfd.yaml"
        trials = [tmp_path / "compared" / name / "trial.json" for name in ("sfd", "second")]
        before = [trial.read_text() for trial in trials]
        first.write_text(first.read_text().replace("batch_size: 16", "batch_size: 32"))
        calls.clear()
        ended = compare(command, path)
        assert re.search(r"has other settings \(\S*batch_size: 16, now 32\)", ended.out)
        # Or the run would not fit its trial with the old settings back.
        assert calls == [] and [trial.read_text() for trial in trials] == before
        assert compare(command, path, "--overwrite", "true").status == 0
        # The second stage's student is another one, too, for all its own settings are the same.
        assert [name for _, name in calls] == ["trial", "sfd", "trial", "second"]
        calls.clear()
        assert compare(command, path).status == 0
        assert calls == []

    def test_teacher_evaluations(self, command: Command, calls: Calls, tmp_path: Path) -> None:
        path = write_comparison(tmp_path, "sfd", budget="100 teacher evaluations")
        ended = compare(command, path)
        assert ended.status == 0, ended.out
        cost = json.loads((tmp_path / "compared/sfd/cost.json").read_text())
        trial = json.loads((tmp_path / "compared/sfd/trial.json").read_text())
        assert trial["evaluations_per_update"] > 0
        assert 0 < cost["teacher_evaluations"] <= 100 + 2 * trial["evaluations_per_update"]


class TestOnly:
    def test_one_row_and_what_is_known_of_the_others(
        self, command: Command, calls: Calls, tmp_path: Path
    ) -> None:
        path = write_comparison(tmp_path, "cd", "sfd", "broken")
        assert compare(command, path, "--only", "cd").status == 0
        assert [name for _, name in calls] == ["cd"]
        table = (tmp_path / "compared/report/report.md").read_text()
        assert re.search(r"\| all \| SFD \| not run yet \|", table)
        calls.clear()
        assert compare(command, path, "--only", "sfd").status == 0
        assert [name for _, name in calls] == ["sfd"]
        table = (tmp_path / "compared/report/report.md").read_text()
        assert re.search(r"\| all \| CD \| 1 \|", table)
        assert re.search(r"\| all \| SFD \| 2 \|", table)
        # Rows of two budgets never stand in one table.
        options = ("--only", "sfd", "--budget", "6 updates", "--overwrite", "true")
        assert compare(command, path, *options).status == 0
        table = (tmp_path / "compared/report/report.md").read_text()
        assert re.search(r"\| all \| CD \| its run has other settings \(trainer", table)
        assert re.search(r"\| all \| SFD \| 2 \|.*\| 6 \|", table)

    def test_an_unknown_name(self, command: Command, tmp_path: Path) -> None:
        path = write_comparison(tmp_path, "cd")
        ended = compare(command, path, "--only", "cdd")
        assert ended.status == 1
        assert "--only cdd: there is no such entry; there are cd." in ended.error


def without(key: str) -> Callable[[dict], None]:
    return lambda given: given.pop(key)


class TestBadFiles:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda g: g.update(entrys=[]), "entrys"),
            (lambda g: g["entries"][0].update(stepz=[1]), "stepz"),
            (lambda g: g["entries"][0].update(steps=[0]), "at least 1"),
            (lambda g: g["evaluation"].update(extractor="Nothing"), "extractor"),
            (lambda g: g["evaluation"].update(num_images=3), "num_images must be at least 50"),
            (lambda g: g["evaluation"].update(solvers=["eulr"]), "eulr"),
            (lambda g: g["evaluation"].update(resamples=1), "resamples=1: an interval takes at"),
            (lambda g: g.update(budget="an hour"), "an hour"),
            (lambda g: g.update(entries=[]), "at least one"),
            (lambda g: g["entries"][0].update(config="nowhere.yaml"), "nowhere.yaml"),
            (without("teacher"), "teacher"),
        ],
    )
    def test_is_one_sentence(
        self, change: Callable[[dict], None], said: str, command: Command, tmp_path: Path
    ) -> None:
        path = write_comparison(tmp_path, "cd")
        given = yaml.safe_load(path.read_text())
        change(given)
        path.write_text(yaml.safe_dump(given))
        ended = compare(command, path)
        assert ended.status in (1, 2)
        assert said in ended.error
        assert not (tmp_path / "compared").exists()

    def test_no_file(self, command: Command) -> None:
        assert "a file is missing" in compare(command, "--only", "cd").error
        assert "nowhere.yaml" in compare(command, "nowhere.yaml").error


class TestProcesses:
    def test_the_error_of_a_command_becomes_a_sentence(self, tmp_path: Path) -> None:
        log = tmp_path / "run" / "log.txt"
        with pytest.raises(training.RunError, match="There is no folder nowhere"):
            training.command(["sample", "nowhere"], log)  # which starts faster than fit
        assert log.read_text().startswith("$ lit-distill sample nowhere\n")

    def test_other_ends(self, tmp_path: Path) -> None:
        log = tmp_path / "log.txt"
        assert "ended by signal 9" in training._last_words("step 3\n", -9, log)
        said = training._last_words("Traceback\nRuntimeError: no\n\n", 1, log)
        assert said == f"its process ended with status 1: RuntimeError: no (see {log})"


BROWSER = next(
    filter(
        None,
        map(
            shutil.which,
            [
                os.environ.get("CHROMIUM", "chromium"),
                *("chromium-browser", "google-chrome", "chromium-headless-shell"),
            ],
        ),
    ),
    None,
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium in the PATH, nor named by CHROMIUM")
def test_the_page_opens_in_a_browser(command: Command, calls: Calls, tmp_path: Path) -> None:
    """Without a message on its console, without a request, and with something to see."""
    path = write_comparison(tmp_path, "cd", "broken")
    compare(command, path)
    shot = tmp_path / "page.png"
    said, asked = opened(tmp_path / "compared/report/index.html", shot)
    assert "CONSOLE" not in said
    assert not asked
    with Image.open(shot) as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 100


@pytest.mark.skipif(BROWSER is None, reason="no Chromium in the PATH, nor named by CHROMIUM")
def test_what_a_page_would_be_caught_at(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://outside.invalid/a.png"><script>nothing.here()</script>')
    said, asked = opened(page, tmp_path / "page.png")
    assert "CONSOLE" in said and "nothing is not defined" in said
    assert asked == {"http://outside.invalid/a.png"}


def opened(page: Path, shot: Path) -> tuple[str, set[str]]:
    """Open a page and take its picture: the browser's messages, and what the page asked for."""
    net = shot.with_name("net.json")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += ["--enable-logging=stderr", f"--log-net-log={net}", "--window-size=1400,1600"]
    options += [f"--user-data-dir={shot.with_name('profile')}", f"--screenshot={shot}"]
    assert BROWSER is not None
    ended = subprocess.run(
        [BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert shot.is_file(), ended.stderr
    told = [event.get("params", {}) for event in json.loads(net.read_text())["events"]]
    # The browser looks for updates and the time of day on its own, from no page.
    asked = {t["url"] for t in told if t.get("initiator", "not an origin") != "not an origin"}
    return ended.stderr, {url for url in asked if not url.startswith(("file:", "data:", "blob:"))}
