"""Train a drafter from collected features, alone or under accelerate.

    accelerate launch train.py recipe=smollm2

The same run as `dflash-train train recipe=smollm2`, to the bit, with one difference: a run that is
complete is trained again, since whoever starts this script asks for a training.
"""

import sys

from dflash_train.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--force", *sys.argv[1:]]))
