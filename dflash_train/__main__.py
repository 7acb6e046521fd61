"""`python -m dflash_train` is `dflash-train`."""

import sys

from dflash_train.cli import main

sys.exit(main())
