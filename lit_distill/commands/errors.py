"""Errors as one line that a person can act on."""

import re

_FRAME = re.compile(
    r"(- )?(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:"
    r"|Given value( type)?: .*|Expected a path but .* either not accessible or invalid)"
)
_MISMATCH = re.compile(r"- Expected a (<class '\w+'>|path)")
_DUMP = re.compile(r"\. Got value: Namespace\(.*")


def one_line(error: BaseException) -> str:
    """The error's message on one line.

    jsonargparse lists, for each type that an option may have, why the value is not of it, and then
    prints all values. Only the reasons that say more than "it is no string" are kept: among them
    is what a class itself complained about.

    Args:
        error: Any error.
    """
    lines = [_DUMP.sub("", line.strip()) for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not _FRAME.fullmatch(line)]
    if len(reasons) < len(lines):
        telling = [line for line in reasons if not _MISMATCH.fullmatch(line)]
        # Were all reasons mere mismatches, the last line left would be the name of the option.
        reasons = reasons if not telling or telling[-1].endswith(":") else telling
    unique = dict.fromkeys(line.removeprefix("- ") for line in reasons)
    return " ".join(" ".join(unique).split()) or type(error).__name__
