"""``lit-distill export``: a run's folder to the hub, or as a copy, with a fresh model card."""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_distill.commands.sample import Parser


def run_export(args: list[str]) -> int:
    """Upload a run's folder, or copy it.

    Args:
        args: The command line after ``export``.

    Returns:
        The exit status, 0.

    Raises:
        argparse.ArgumentError: The command line is wrong.
        FileNotFoundError: There is no such folder.
        OSError: There is no token, or the hub cannot be reached or refuses.
        ValueError: It is no diffusers folder, something is in the copy's way, or the hub takes no
            such name.
    """
    parser = _parser()
    options = parser.parse_args(args)
    if options.private and options.push_to_hub is None:
        parser.error("--private goes with --push-to-hub NAME")
    # Here, as Lightning and diffusers take seconds to import.
    from lit_distill.callbacks.report import numbers_of
    from lit_distill.models import updates_of

    folder = _pipeline_folder(options.folder)
    # The metrics.json of a run is of its pipeline/ alone, not of a stage or another average.
    numbers = None
    if folder.resolve().name == "pipeline":
        numbers = numbers_of(folder.resolve().parent, updates_of(folder))
    if options.out is not None:
        _copy(folder, options.out, numbers)
    else:
        _push(folder, options.push_to_hub, options.private, numbers)
    return 0


def _pipeline_folder(folder: Path) -> Path:
    """The diffusers folder itself, or that of a run."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}. Give a run's folder or its pipeline/, for example "
            "runs/digits/dmd/pipeline."
        )
    for found in (folder, folder / "pipeline"):
        if (found / "model_index.json").is_file():
            return found
    raise ValueError(
        f"Neither {folder} nor {folder / 'pipeline'} is a diffusers folder (model_index.json is "
        "missing): a fit with ExportPipeline writes one at its end."
    )


def _copy(folder: Path, out: Path, numbers: str | None) -> None:
    from lit_distill.models import folder_in_place, update_card

    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {out} lies in the folder that is copied: name another.")
    with folder_in_place(out) as draft:
        shutil.copytree(folder, draft, dirs_exist_ok=True)
        update_card(draft, numbers)
    _tell_of_own_card(out)
    print(f"Copied {folder} to {out}")


def _push(folder: Path, name: str, private: bool, numbers: str | None) -> None:
    from huggingface_hub import HfApi, get_token

    from lit_distill.models import has_own_card, update_card
    from lit_distill.models.saving import CARD

    if get_token() is None:
        raise OSError(
            "There is no token of the hub on this machine: make one that may write at "
            "https://huggingface.co/settings/tokens, run `hf auth login` (or set HF_TOKEN), and "
            "then this command again."
        )
    api = HfApi(library_name="lit_distill")
    with _as_sentences(folder, name):
        # None leaves an organisation's default, and a repository that is there already, alone.
        repo = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        theirs = api.file_exists(repo, CARD) and Path(api.hf_hub_download(repo, CARD)).parent
    left_out = []
    if theirs and has_own_card(theirs) and not has_own_card(folder):
        left_out = [CARD]
        print(f"The card of {repo} on the hub is not of lit_distill: it stays as it is there.")
    update_card(folder, numbers, repo)
    _tell_of_own_card(folder)
    with _as_sentences(folder, name):
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=left_out,
            commit_message="Upload a model with lit_distill",
        )
    print(f"Uploaded {folder} to https://huggingface.co/{repo}")


@contextmanager
def _as_sentences(folder: Path, name: str) -> Iterator[None]:
    """Say of the hub's errors what a person can do."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub {name}: no name for the hub. {error}") from error
    except Exception as error:  # the client raises errors of many kinds without a common base
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if status in (401, 403):
            raise OSError(
                f"The hub does not let this token write {name} ({reason}). Log in with one that "
                "may (`hf auth login`), or name a repository of your own."
            ) from error
        raise OSError(
            f"{folder} could not be uploaded as {name} ({reason}). Nothing is lost: run this "
            "command again where the hub can be reached and takes it."
        ) from error


def _tell_of_own_card(folder: Path) -> None:
    """Say so where a card is a person's own."""
    from lit_distill.models import has_own_card

    if has_own_card(folder):
        print(f"{folder / 'README.md'} is a card of your own and stays as it is.")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lit-distill export",
        description="Upload or copy the folder of a trained model, with a fresh model card.",
    )
    parser.add_argument("folder", type=Path, help="a run's folder or its pipeline/")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--push-to-hub", metavar="NAME", help="its name there: [user/]model")
    target.add_argument("--out", type=Path, metavar="FOLDER", help="the folder to copy it to")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    return parser
