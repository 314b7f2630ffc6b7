"""Until the next release: `python -m experiments.compare CONFIG` is `python -m experiments.train CONFIG`."""

import sys

from experiments.train import main

if __name__ == "__main__":
    print("experiments.compare is deprecated and goes with the next release: use experiments.train", file=sys.stderr)
    sys.exit(main())
