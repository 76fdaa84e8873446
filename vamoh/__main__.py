"""`python -m vamoh`: the same as the command `vamoh`."""

import sys

from vamoh.cli import main

sys.exit(main())
