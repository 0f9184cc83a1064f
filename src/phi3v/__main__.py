"""``python -m phi3v``: the command line, also under launchers such as torchrun."""

import sys

from phi3v.cli import main

sys.exit(main())
