"""`python -m flows.batch`."""

import sys

from flows.runtime.import_path import forget_current_folder

if __name__ == "__main__":
    forget_current_folder()
    from flows.batch.run import main
    from flows.runtime.process import exit_code, own_process

    own_process()
    sys.exit(exit_code(main()))
