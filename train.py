"""Door for torchrun: `torchrun --nproc-per-node 8 train.py RECIPE [a.b=c …]`."""

import sys

from openlm_lite.__main__ import leave, main

if __name__ == "__main__":
    leave(main(["train", *sys.argv[1:]]))
