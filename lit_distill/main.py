"""The command line: ``lit-distill fit | test | predict | sample | export | ...``."""

import os
import sys
from argparse import ArgumentError

from lit_distill.commands.errors import one_line

HELP = """\
usage: lit-distill COMMAND [options]

Distill a diffusion model into a one- to few-step generator.

commands:
  fit       train a teacher or distill it into a student
  validate  evaluate a trained run on the validation data
  test      evaluate it on the test data: a table and metrics.json
  predict   write noise-image pairs with a teacher
  sample    draw images from an exported folder (a teacher's or a student's)
  import    turn a checkpoint in another format into such a folder
  export    upload such a folder to the hub, or copy it, with a fresh model card
  compare   many methods on one teacher and budget: a table and a page of pictures

examples:
  lit-distill fit --config configs/digits/teacher.yaml
  lit-distill sample runs/digits/dmd/pipeline --num-images 64 --steps 1 --out digits.png

All options: lit-distill COMMAND --help.  Version: lit-distill --version.
The traceback behind an error: LIT_DISTILL_DEBUG=1 lit-distill COMMAND ...
"""
TRAINING = ("fit", "validate", "test", "predict")
OTHERS = ("sample", "import", "export", "compare")


def main(args: list[str] | None = None) -> int:
    """Run one command as a shell would.

    Args:
        args: The command and its options; those of the process where None.

    Returns:
        The exit status: 0, 1 after an error, 2 after a wrong command line, 130 after Ctrl-C,
        143 after a SIGTERM.
    """
    args = sys.argv[1:] if args is None else args
    try:
        return _run(args)
    except ArgumentError as error:
        return _report(error, status=2)
    except KeyboardInterrupt:
        return _stopped()
    except SystemExit as exit_:  # --help ends so, and Lightning's own answer to Ctrl-C
        if isinstance(exit_.__context__, KeyboardInterrupt):
            return _stopped()
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        return _report(error, status=1)


def _run(args: list[str]) -> int:
    command = args[0] if args else ""
    if command in TRAINING:  # imported here, as --version and sample need none of Lightning
        from lit_distill.commands.training import run_training

        return run_training(args)
    if command == "sample":
        from lit_distill.commands.sample import run_sample

        return run_sample(args[1:])
    if command == "import":
        from lit_distill.commands.importing import run_import

        return run_import(args[1:])
    if command == "export":
        from lit_distill.commands.exporting import run_export

        return run_export(args[1:])
    if command == "compare":
        from lit_distill.commands.compare import run_compare

        return run_compare(args[1:])
    if command == "--version":
        from lit_distill import __version__

        print(__version__)
        return 0
    if command in ("-h", "--help"):
        print(HELP, end="")
        return 0
    problem = f"there is no command '{command}'" if command else "a command is missing"
    raise ArgumentError(
        None,
        f"{problem}: choose one of {', '.join((*TRAINING, *OTHERS))}, or see --help.",
    )


def _stopped() -> int:
    print("lit-distill: stopped", file=sys.stderr)
    return 130


def _report(error: Exception, status: int) -> int:
    if os.environ.get("LIT_DISTILL_DEBUG", "0") not in ("", "0"):
        raise error
    print(f"lit-distill: error: {one_line(error)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
