"""The model card of a diffusers folder: its ``README.md``, in the format of the hub.

A card that does not carry our marker is a person's own, and kept whatever is written.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache

from lit_distill.models.saving import CARD, MARKER, SIDECAR, has_own_card

_OWN = "lit_distill"  # our key in the card's front matter
_LICENSE = ("license", "license_name", "license_link")
_PROMPT = "a photo of a cat"
_UNMEASURED = "None were measured on these weights."


def write_card(
    folder: str | Path,
    *,
    method: str | None = None,
    facts: Mapping[str, str] | None = None,
    teacher: str | None = None,
    student_updates: int | None = None,
) -> bool:
    """Write the card of a folder; the numbers come with :func:`update_card`, after a test.

    Args:
        folder: A diffusers folder.
        method: What it was trained by; None where that is not known.
        facts: The recipe: a text for each heading.
        teacher: Folder or hub id of the teacher that it comes from; "" where that has none, and
            None where there is no teacher.
        student_updates: Updates that its weights had, by which numbers are known to be of them.

    Returns:
        Whether it was written: not where a card of the user's own is there.
    """
    folder = Path(folder)
    if has_own_card(folder):
        return False
    index = json.loads((folder / "model_index.json").read_text())
    terms = _license_of(teacher) if teacher else {}
    lines = [f"- **{name}**: {text}".replace(": \n", ":\n") for name, text in (facts or {}).items()]
    recipe = "\n".join(lines) or "Not recorded: this folder was not exported by a training run."
    steps = (_sidecar(folder).get("few_steps") or {}).get("trained", ())
    title = method or "A diffusion model"
    if steps:
        *others, last = map(str, sorted(steps))
        title += f", {', '.join(others)}{' or ' if others else ''}{last} step{'s' * (last != '1')}"
    hub_id = teacher and not Path(teacher).exists() and teacher.count("/") == 1
    known = student_updates is not None
    own: dict[str, Any] = {_OWN: {"student_updates": student_updates}} if known else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image" if _takes_prompts(index) else "unconditional-image-generation",
        tags=["lit_distill", *(["distillation"] if steps else [])],
        base_model=teacher if hub_id else None,
        ignore_metadata_errors=True,
        **terms,
        **own,
    )
    text = "\n\n".join(
        [
            MARKER,
            f"# {title}",
            "Exported with lit_distill (diffusion distillation on PyTorch Lightning).",
            f"## Recipe\n\n{recipe}",
            f"## Numbers\n\n{_UNMEASURED}",
            f"## Use\n\n{_usage(folder, None)}",
            f"## Licence\n\n{_license_text(terms, method, teacher)}",
        ]
    )
    _write(folder, f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    return True


def update_card(folder: str | Path, numbers: str | None = None, name: str | None = None) -> bool:
    """Bring the numbers and the lines of use in a card up to date; a missing card is written.

    All other sections stay as they are.

    Args:
        folder: A diffusers folder.
        numbers: What an evaluation printed; None leaves those that the card has.
        name: The folder's name on the hub, if it goes there.

    Returns:
        Whether it was written: not where a card of the user's own is there.
    """
    folder = Path(folder)
    if has_own_card(folder):
        return False
    if not (folder / CARD).is_file():
        write_card(folder)
    content = (folder / CARD).read_text(encoding="utf-8")
    if numbers is not None:
        content = _with_section(content, "Numbers", f"```\n{numbers}\n```")
    _write(folder, _with_section(content, "Use", _usage(folder, name)))
    return True


def updates_of(folder: str | Path) -> int | None:
    """The student updates that a card of ours says its weights had."""
    return (_front_matter(Path(folder) / CARD).get(_OWN) or {}).get("student_updates")


def _license_of(teacher: str) -> dict[str, Any]:
    """What the card beside a teacher says about its licence; no network is asked."""
    local = Path(teacher).is_dir()
    file = Path(teacher) / CARD if local else None
    if file is None and teacher.count("/") == 1:
        cached = try_to_load_from_cache(teacher, CARD)
        file = Path(cached) if isinstance(cached, str) else None
    found = {} if file is None else _front_matter(file)
    return {key: found[key] for key in _LICENSE if found.get("license") and found.get(key)}


def _license_text(terms: Mapping[str, Any], method: str | None, teacher: str | None) -> str:
    if terms:
        name = terms.get("license_name") or terms["license"]
        link = f" ({terms['license_link']})" if "license_link" in terms else ""
        return f"That of the teacher, as its model card says: `{name}`{link}."
    if method is not None and teacher is None:
        return "None is stated: the model has no teacher. Those of its training data apply."
    return "The licence of the teacher applies to this model too. It is not known here."


def _front_matter(file: Path) -> dict[str, Any]:
    """The metadata of a card; none of a card that has none or cannot be read."""
    try:
        found = metadata_load(file) if file.is_file() else None
    except (ValueError, yaml.YAMLError):  # anyone's file; undecodable text is a ValueError
        return {}
    return found or {}


def _sidecar(folder: Path) -> dict[str, Any]:
    file = folder / SIDECAR
    return json.loads(file.read_text()) if file.is_file() else {}


def _usage(folder: Path, name: str | None) -> str:
    """The lines that open a folder and draw an image."""
    index, sidecar = json.loads((folder / "model_index.json").read_text()), _sidecar(folder)
    steps = (sidecar.get("few_steps") or {}).get("trained")
    kind, own_code = index["_class_name"], isinstance(index["_class_name"], list)
    labels = sidecar.get("num_classes") is not None
    where = f'"{name or "."}"' + ("" if name else "  # this folder")
    asked = f'--prompts "{_PROMPT}"' if _takes_prompts(index) else "--num-images 16"
    ours = f"`lit-distill sample {name or '.'} {asked} --out samples.png` draws from it"
    if not steps and not own_code and _needs_a_solver(kind, index, labels):
        return f"It is a teacher, whose network a `{kind}` opens but does not sample well. {ours}."
    arguments = ["class_labels=[0]"] if labels else []
    if _takes_prompts(index):
        arguments.append(f'prompt="{_PROMPT}"')
    arguments.append(f"num_inference_steps={steps[0] if steps else 50}")
    note = ""
    if steps and _takes_prompts(index):
        arguments.append("guidance_scale=1.0")
        if _takes_guidance(folder):
            arguments[-1] = "guidance_scale=3.0"
            note = "The student imitates the scale of guidance that it is asked at. "
    options = ", custom_pipeline=folder, trust_remote_code=True" if own_code else ""
    opener = "DiffusionPipeline" if own_code else kind
    code = "\n".join(
        [
            f"from diffusers import {opener}",
            "",
            f"folder = {where}",
            f"pipe = {opener}.from_pretrained(folder{options})",
            f"image = pipe({', '.join(arguments)}).images[0]",
        ]
    )
    if own_code:
        note += "`pipeline.py` in the folder needs torch and diffusers only; read it first. "
    return f"```python\n{code}\n```\n\n{note}{ours} too."


def _needs_a_solver(kind: str, index: Mapping[str, Any], labels: bool) -> bool:
    """Whether a stock pipeline is no good sampler of a teacher that it opens."""
    scheduler = index.get("scheduler", ["", ""])[1]
    return (
        kind == "ConsistencyModelPipeline"  # its jumps to the end are a student's
        or scheduler == "EDMEulerScheduler"  # DDPMPipeline does not scale its input
        or (labels and kind in ("DDIMPipeline", "DDPMPipeline"))  # they pass no labels
    )


def _takes_prompts(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline has a text encoder; one that may have one names it in any case."""
    return index.get("text_encoder", [None])[0] is not None


def _takes_guidance(folder: Path) -> bool:
    """Whether the network is told the scale of guidance."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    return config.get("time_cond_proj_dim") is not None


def _with_section(text: str, heading: str, body: str) -> str:
    """The text with another body of a section, if it has that section."""
    section = re.compile(rf"^## {heading}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    return section.sub(lambda _: f"## {heading}\n\n{body}\n\n", text).rstrip() + "\n"


def _write(folder: Path, content: str) -> None:
    temporary = folder / f".{CARD}.{os.getpid()}.tmp"
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, folder / CARD)
