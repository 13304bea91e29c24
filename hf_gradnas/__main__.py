"""``python -m hf_gradnas``: runs the command line and defines nothing."""

import sys

from .cli.app import main

if __name__ == "__main__":
    sys.exit(main())
