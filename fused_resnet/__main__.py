"""``python -m fused_resnet COMMAND``."""

import sys

from .cli import main

sys.exit(main())
