"""Until the next release: `python -m experiments.finetune CONFIG` is `python -m experiments.train CONFIG`."""

import sys

from experiments.train import main

if __name__ == "__main__":
    print("experiments.finetune is deprecated and goes with the next release: use experiments.train", file=sys.stderr)
    sys.exit(main())
