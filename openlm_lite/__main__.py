"""The door of `openlm VERB …`, of `python -m openlm_lite VERB …` and of `train.py`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb as this process; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        # What follows imports for some tenths of a second, on a busy machine for seconds. A request
        # to stop waits meanwhile: StopRequest takes over, and lets it through.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    from openlm_lite import cli

    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main())
