"""``python -m lit_distill`` is ``lit-distill``."""

import sys

from lit_distill.main import main

if __name__ == "__main__":
    sys.exit(main())
