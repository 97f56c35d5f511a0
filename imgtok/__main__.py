"""`python -m imgtok` is the `imgtok` command."""

import sys

from imgtok.cli import main

if __name__ == "__main__":
    sys.exit(main())
