"""`python -m flows.audit`."""

import sys

from flows.audit.run import main

if __name__ == "__main__":
    sys.exit(main())
