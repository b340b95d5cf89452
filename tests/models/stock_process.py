"""Opens exported folders in plain diffusers; a process of its own, without lit_distill.

As a script: stock_process.py JOBS.json OUT.npz. For a job ``name`` it writes the images ``name``,
or the sentence ``name/error`` of a ValueError; the class ``name/pipeline`` and the first warning,
``name/warning``.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch


def images_of(jobs: dict[str, Any], root: Path) -> dict[str, Any]:
    """Run jobs in another process; the results by name."""
    (root / "jobs.json").write_text(json.dumps(jobs))
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "code")}
    process = subprocess.run(
        [sys.executable, __file__, root / "jobs.json", root / "images.npz"],
        cwd=root,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "xpected" not in process.stderr, process.stderr  # diffusers found all in its place
    return dict(np.load(root / "images.npz"))


def main(jobs: str, out: str) -> None:
    # A CPU torch cannot import the default torchvision, and diffusers does without. Where the two
    # fit each other, this line is not needed.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from diffusers import DiffusionPipeline, LCMScheduler
    from diffusers.utils import logging

    torch.set_num_threads(1)
    images = {}
    for name, job in json.loads(Path(jobs).read_text()).items():
        pipeline = DiffusionPipeline.from_pretrained(job["folder"], **job.get("loading", {}))
        pipeline.set_progress_bar_config(disable=True)
        if "adapter" in job:
            pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
            logging.set_verbosity_error()  # it tells that there is none of the text encoder
            pipeline.load_lora_weights(job["adapter"])
            logging.set_verbosity_warning()
        generators = [torch.Generator().manual_seed(seed) for seed in job["seeds"]]
        options = {"generator": generators, "output_type": "np", **job["options"]}
        images[f"{name}/pipeline"] = type(pipeline).__name__
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                found = pipeline(return_dict=False, **options)[0]
                images[name] = np.stack([np.asarray(image) for image in found])
            except ValueError as error:
                images[f"{name}/error"] = str(error)
        if caught:
            images[f"{name}/warning"] = f"{caught[0].message} ({Path(caught[0].filename).name})"
    assert not any(name.partition(".")[0] == "lit_distill" for name in sys.modules)
    np.savez(out, **images)


if __name__ == "__main__":
    main(*sys.argv[1:])
