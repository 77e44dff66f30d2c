"""`python -m quantmill`: the command `quantmill`."""

import sys

from flows.runtime.import_path import forget_current_folder

if __name__ == "__main__":
    forget_current_folder()
    from flows.cli.commands import main

    sys.exit(main())
