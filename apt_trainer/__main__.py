"""``python -m apt_trainer VERB ...`` is ``apt-trainer VERB ...``."""

from __future__ import annotations

import sys

from apt_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
