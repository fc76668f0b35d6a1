"""The command `python -m mup2_fused.check`."""

import sys

from mup2_fused.check.command import main

sys.exit(main())
