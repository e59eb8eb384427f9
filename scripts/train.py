"""``accelerate launch scripts/train.py --config R.yaml`` does what ``apt-trainer train --config R.yaml`` does."""

import sys

from apt_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
