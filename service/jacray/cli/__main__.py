"""`python -m jacray.cli`."""

import sys

from jacray.cli import main

sys.exit(main())
