"""What a test sees of a command that ended."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Ended:
    """How a command ended: exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line of an error; fails if there was more, a traceback for instance."""
        lines = [line for line in self.err.splitlines() if "lit-distill:" in line]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


Command = Callable[..., Ended]
