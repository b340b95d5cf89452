"""``lit-distill export`` with a hub of this test: no network is asked."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from ended import Command
from small_teacher import export

from lit_distill.callbacks.report import make_row, write_rows
from lit_distill.diffusion import FewSteps
from lit_distill.models import write_card
from lit_distill.models.saving import MARKER


class Hub:
    """What is asked of ``HfApi``; ``card`` is one that the repository has already."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.card, self.error = folder, None, None
        self.created, self.uploaded = {}, {}

    def __call__(self, **options):
        return self

    def create_repo(self, name, *, private, exist_ok):
        if self.error is not None:
            raise self.error
        huggingface_hub.utils.validate_repo_id(name)
        self.created = {"name": name, "private": private, "exist_ok": exist_ok}
        return SimpleNamespace(repo_id=name if "/" in name else f"someone/{name}")

    def file_exists(self, repo, name):
        return self.card is not None

    def hf_hub_download(self, repo, name):
        (self.folder / name).write_text(self.card)
        return str(self.folder / name)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        card = (Path(folder_path) / "README.md").read_text()
        self.uploaded = {"repo": repo_id, "without": ignore_patterns, "card": card}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "hub").mkdir()
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return hub


@pytest.fixture
def run(command: Command) -> Path:
    """A run's folder; 30 updates were exported and tested."""
    run = Path("runs/dmd")
    export(run / "pipeline", few_steps=FewSteps((1,)))
    write_card(run / "pipeline", method="DMD", facts={"Method": "DMD"}, student_updates=30)
    write_metrics(run, 30)
    return run


def write_metrics(run: Path, updates: int) -> None:
    values = {"method": "DMD", "nfe": 1, "fd_teacher": 0.125, "student_updates": updates}
    references = {"floors": {}, "reference_images": {"teacher": 200}}
    write_rows([make_row("digits", **values, **references)], run / "metrics.json")


def test_it_uploads_with_numbers_and_the_name(command: Command, run: Path, hub: Hub) -> None:
    ended = command("export", run, "--push-to-hub", "digits")
    assert ended.status == 0, ended.err
    assert hub.created == {"name": "digits", "private": None, "exist_ok": True}
    assert hub.uploaded["repo"] == "someone/digits" and hub.uploaded["without"] == []
    assert "0.125" in hub.uploaded["card"] and 'folder = "someone/digits"' in hub.uploaded["card"]
    assert "https://huggingface.co/someone/digits" in ended.out


def test_private(command: Command, run: Path, hub: Hub) -> None:
    ended = command("export", run / "pipeline", "--push-to-hub", "a/b", "--private")
    assert ended.status == 0 and hub.created["private"] is True
    wrong = command("export", run, "--out", "copy", "--private")
    assert wrong.status == 2 and "--private goes with --push-to-hub" in wrong.error


def test_a_foreign_card_on_the_hub_stays(command: Command, run: Path, hub: Hub) -> None:
    hub.card = "# Written on the site\n"
    ended = command("export", run, "--push-to-hub", "digits")
    assert hub.uploaded["without"] == ["README.md"] and "stays as it is there" in ended.out
    hub.card = MARKER
    command("export", run, "--push-to-hub", "digits")
    assert hub.uploaded["without"] == []


def test_a_card_of_the_users_own_is_uploaded(command: Command, run: Path, hub: Hub) -> None:
    (run / "pipeline" / "README.md").write_text("# Mine\n")
    hub.card = "# Mine, of last week\n"
    ended = command("export", run, "--push-to-hub", "digits")
    assert hub.uploaded["card"] == "# Mine\n" and hub.uploaded["without"] == []
    assert "a card of your own and stays" in ended.out


def test_it_copies_with_numbers(command: Command, run: Path) -> None:
    ended = command("export", run, "--out", "published/digits")
    assert ended.status == 0, ended.err
    copy = Path("published/digits")
    names = {path.relative_to(copy) for path in copy.rglob("*")}
    assert names == {p.relative_to(run / "pipeline") for p in (run / "pipeline").rglob("*")}
    assert "0.125" in (copy / "README.md").read_text()
    assert "0.125" not in (run / "pipeline" / "README.md").read_text()
    assert [path.name for path in Path("published").iterdir()] == ["digits"]
    again = command("export", copy, "--out", "published/again")
    assert again.status == 0
    assert "0.125" in Path("published/again/README.md").read_text()


def test_a_copy_over_a_card_of_the_users_own_keeps_it(command: Command, run: Path) -> None:
    command("export", run, "--out", "copy")
    Path("copy/README.md").write_text("# Mine\n")
    ended = command("export", run, "--out", "copy")
    assert ended.status == 0 and "a card of your own and stays" in ended.out
    assert Path("copy/README.md").read_text() == "# Mine\n"


def test_numbers_of_other_weights_are_left_out(command: Command, run: Path) -> None:
    write_metrics(run, 20)
    assert command("export", run, "--out", "copy").status == 0
    assert "None were measured" in Path("copy/README.md").read_text()


@pytest.mark.parametrize("content", ["{", "[]", "[3]", json.dumps([{"method": "DMD"}])])
def test_damaged_numbers_are_named(command: Command, run: Path, content: str) -> None:
    (run / "metrics.json").write_text(content)
    ended = command("export", run, "--out", "copy")
    assert ended.status == 1 and "metrics.json is damaged" in ended.error
    assert not Path("copy").exists()


def test_what_is_no_folder_is_named(command: Command, run: Path, hub: Hub) -> None:
    missing = command("export", "runs/none", "--push-to-hub", "x")
    assert missing.status == 1 and "There is no folder runs/none" in missing.error
    Path("empty").mkdir()
    empty = command("export", "empty", "--push-to-hub", "x")
    assert empty.status == 1 and "is a diffusers folder" in empty.error
    inside = command("export", run, "--out", run / "pipeline" / "copy")
    assert inside.status == 1 and "lies in the folder that is copied" in inside.error
    nowhere = command("export", run)
    assert nowhere.status == 2 and "--push-to-hub" in nowhere.error
    (Path("empty") / "notes.txt").write_text("mine")
    in_the_way = command("export", run, "--out", "empty")
    assert in_the_way.status == 1 and "is not replaced" in in_the_way.error
    assert not hub.created


def test_without_a_token(command: Command, run: Path, hub: Hub, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    ended = command("export", run, "--push-to-hub", "digits")
    assert ended.status == 1 and "hf auth login" in ended.error
    assert not hub.created


class RefusalError(Exception):
    response = SimpleNamespace(status_code=403)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConnectionError("no route\nto host"), "could not be uploaded as digits"),
        (RefusalError("Forbidden"), "does not let this token write digits"),
    ],
)
def test_a_hub_that_fails(command: Command, run: Path, hub: Hub, error, sentence: str) -> None:
    hub.error = error
    ended = command("export", run, "--push-to-hub", "digits")
    assert ended.status == 1 and sentence in ended.error and str(error).split()[0] in ended.error
    assert not hub.uploaded


def test_a_name_that_is_none(command: Command, run: Path, hub: Hub) -> None:
    ended = command("export", run, "--push-to-hub", "a/b/c")
    assert ended.status == 1 and "--push-to-hub a/b/c: no name for the hub" in ended.error
