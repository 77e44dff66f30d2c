"""A server on loopback that speaks S3, for tests and benches: moto's, made to fail where asked.

python -m tests.store   serves until stdin ends; prints its URL first
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

SECRET = "a-secret-that-nobody-may-write-down"
BUCKET = "bucket"


@dataclass
class Requests:
    """What the server was asked for, and how it fails.

    status   of a request (method and path), "" where it is answered as usual
    delay_s  before every answer
    """

    status: Callable[[str, str], str] = lambda method, path: ""
    delay_s: float = 0.0
    seen: list[tuple[str, str]] = field(default_factory=list)

    def wrap(self, app: Callable[..., Any]) -> Callable[..., Any]:
        def answer(environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Any:
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            self.seen.append((method, path))
            time.sleep(self.delay_s)
            if status := self.status(method, path):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response(status, [("Content-Type", "application/xml")])
                return [b"<Error><Code>ServiceUnavailable</Code><Message>busy</Message></Error>"]
            return app(environ, start_response)

        return answer


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, Requests]]:
    """The URL of a server with one empty bucket, and its requests."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    requests = Requests()
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, requests.wrap(app), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.port}"
    # moto keeps what earlier servers of this process were given
    for path, method in (("moto-api/reset", "POST"), (BUCKET, "PUT")):
        urllib.request.urlopen(urllib.request.Request(f"{url}/{path}", method=method)).close()
    try:
        yield url, requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def credentials(url: str) -> dict[str, str]:
    """The environment with which S3's clients find the server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_RETRY_MODE": "standard",
        "AWS_MAX_ATTEMPTS": "2",
    }


if __name__ == "__main__":
    with s3_server() as (url, _):
        print(url, flush=True)  # noqa: T201
        sys.stdin.read()
        os._exit(0)
