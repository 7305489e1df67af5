"""`python -m mlec` is the command `mlec`."""

import sys

from mlec.cli import main

sys.exit(main())
