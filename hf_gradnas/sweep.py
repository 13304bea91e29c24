"""``python -m hf_gradnas.sweep``: runs the command and defines nothing."""

import sys

from .cli.app import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
