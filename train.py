"""Door for torchrun: `torchrun --nproc-per-node 8 train.py RECIPE [a.b=c …]`."""

import signal
import sys

if __name__ == "__main__":
    # Nothing is lost while the next line imports: StopRequest takes over, and lets them through.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    from openlm_lite.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
