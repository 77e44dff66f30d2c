"""The certificate of our own cluster holds at whatever time the clock of the host is set to."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime

import pytest
from cryptography import x509

from flows.runtime.tls import own_security


@pytest.mark.parametrize("year", [1970, 2024, 2199])
def test_the_certificate_holds_whatever_the_clock_says(year):
    (certificate,) = x509.load_pem_x509_certificates(own_security().tls_ca_file.encode())
    now = datetime(year, 6, 1, tzinfo=UTC)

    assert certificate.not_valid_before_utc < now < certificate.not_valid_after_utc


def test_two_parts_of_one_cluster_trust_each_other_and_nobody_else():
    ours, other = own_security(), own_security()

    assert shake_hands(ours, ours)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(ours, other)


def shake_hands(worker, scheduler) -> bool:
    """Whether a worker and a scheduler agree. Raises: ssl.SSLError if they do not."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = worker.get_connection_args("worker")["ssl_context"]
    client = context.wrap_bio(to_client, to_server)
    context = scheduler.get_listen_args("scheduler")["ssl_context"]
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return client.version() is not None and server.version() is not None
