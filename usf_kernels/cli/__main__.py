"""`python -m usf_kernels.cli` is `usf-kernels`."""

import sys

from usf_kernels.cli import main

sys.exit(main())
