"""`python -m openlm_lite VERB …` is `openlm VERB …`."""

import sys

from openlm_lite.cli import main

sys.exit(main())
