"""`python -m benchmarks.bench` is `tropd bench`."""

import sys

from benchmarks.bench.command import main

sys.exit(main())
