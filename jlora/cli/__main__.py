"""`python -m jlora.cli`."""

import sys

from jlora.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
