"""`python -m merge_callback`."""

import sys

from merge_callback.cli import main

sys.exit(main())
