"""`python -m flows.batch`."""

import sys

from flows.batch.run import main

if __name__ == "__main__":
    sys.exit(main())
