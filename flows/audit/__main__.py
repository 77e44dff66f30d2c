"""`python -m flows.audit DIR`: the command `quantmill audit DIR`."""

import sys

from flows.runtime.import_path import forget_current_folder

if __name__ == "__main__":
    forget_current_folder()
    from flows.cli.commands import main
    from flows.runtime.process import own_process

    own_process()
    sys.exit(main(["audit", *sys.argv[1:]]))
