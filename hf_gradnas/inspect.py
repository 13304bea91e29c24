"""``python -m hf_gradnas.inspect``: runs the command and defines nothing."""

import sys

from .cli.app import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
