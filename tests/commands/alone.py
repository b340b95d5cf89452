"""Commands and scripts in processes of their own, which start at once.

A new Python takes seconds to import torch and Lightning. These processes are forks of one that has
imported them and done nothing else, so that no thread runs there which a fork would lose.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import torch
from lightning.pytorch.utilities import rank_zero_only

from lit_distill.main import main

_FORKS = multiprocessing.get_context("forkserver")
_PARTS = ("commands.training", "callbacks", "datamodules", "methods")
_FORKS.set_forkserver_preload([f"lit_distill.{part}" for part in _PARTS])
_TIMEOUT = 280  # seconds
_Result = CompletedProcess[str]


def run_alone(command: list[str], processes: int = 1) -> _Result:
    """Run a command of the command line, with one thread.

    Args:
        command: ``["fit", "--config", ...]``.
        processes: How many run it together, as a launcher such as torchrun starts them.

    Returns:
        The first exit status that is not 0, and what all of them said.

    Raises:
        TimeoutError: One did not end. It is no status, as a kill that a test plans has one too.
    """
    return _run(main, command, processes)


def run_script(path: Path, *arguments: object, processes: int = 1) -> _Result:
    """Run a script likewise."""
    return _run(_as_script, [str(path), *map(str, arguments)], processes)


def _as_script(arguments: list[str]) -> int:
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


def _run(run: Callable[[list[str]], int], arguments: list[str], processes: int) -> _Result:
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, f"{stream}{rank}") for rank in range(processes) for stream in "oe"]
        started = []
        for rank, environment in enumerate(_environments(processes)):
            told = (run, arguments, environment, os.getcwd(), said[2 * rank : 2 * rank + 2])
            started.append(_FORKS.Process(target=_child, args=told))
            started[-1].start()
        deadline = time.monotonic() + _TIMEOUT
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        late = any(process.is_alive() for process in started)
        for process in started:
            process.kill()
            process.join()
        texts = [path.read_text() if path.exists() else "" for path in said]
    if late:
        raise TimeoutError(f"{arguments} did not end in {_TIMEOUT} s: {texts}")
    status = next((p.exitcode for p in started if p.exitcode), 0)
    return CompletedProcess(arguments, status, "".join(texts[::2]), "".join(texts[1::2]))


def _environments(processes: int) -> list[dict[str, str]]:
    if processes == 1:
        return [dict(os.environ)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    together["WORLD_SIZE"] = str(processes)
    return [{**os.environ, **together, "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _child(
    run: Callable[[list[str]], int],
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    said: list[Path],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # else read at the import
    torch.set_num_threads(1)
    sys.exit(run(arguments))
