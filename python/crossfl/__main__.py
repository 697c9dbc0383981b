"""`python -m crossfl`, the same as `crossfl`."""

import sys

from crossfl.cli import main

sys.exit(main())
