"""Prefect's API on a socket of the parent: `python -m flows.runtime.api_server FILE_DESCRIPTOR`.

The process ends with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import threading

from flows.runtime.process import importing


def main() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, where Linux can
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with importing():
        import uvicorn
        from prefect.server.api.server import create_app

        # No background services: nothing is scheduled here, and our record is the journal.
        app = create_app(ephemeral=True, webserver_only=True, final=True)
    gc.freeze()
    config = uvicorn.Config(app, log_level="critical", lifespan="on", access_log=False)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[1]))])


def _end_with_parent() -> None:
    """Exit when the parent has: it holds the other end of stdin, so reading ends with it."""
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
