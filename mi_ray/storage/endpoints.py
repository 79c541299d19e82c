"""Endpoints of compatible stores: whether one answers, asked once before a run, in place of minutes of retries."""

import os
import socket
import ssl
import time
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

PATIENCE_S = 10
_failed: dict[str, tuple[float, str]] = {}  # {endpoint: (time, message)}: several parts of a job ask at its start


def check_reachable(endpoint: str):
    """Connect to an endpoint, and for https check its certificate as the store's clients do.

    Raises:
        OSError: it cannot be reached, or its certificate is not trusted. Within a few seconds the answer is the same.
    """
    when, message = _failed.get(endpoint, (-PATIENCE_S, ""))
    if time.monotonic() - when < PATIENCE_S:
        raise OSError(message)
    try:
        _connect(endpoint)
    except OSError as error:
        _failed[endpoint] = time.monotonic(), str(error)
        raise


def _connect(endpoint: str):
    parts = urlsplit(endpoint)
    if parts.hostname is None:
        raise OSError(f"the endpoint {endpoint!r} names no host; give endpoint_override=HOST:PORT")
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname):
        return  # the clients connect to the proxy
    address = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection(address, PATIENCE_S) as connection:
            if parts.scheme == "https":
                context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)
                context.wrap_socket(connection, server_hostname=parts.hostname).close()
    except ssl.SSLCertVerificationError as error:
        advice = "set AWS_CA_BUNDLE to the file of its authority's certificates"
        raise OSError(f"the certificate of {endpoint} is not trusted ({error}); {advice}") from error
    except OSError as error:
        advice = "check the endpoint, its scheme and the network"
        raise OSError(f"{endpoint} does not answer ({error.strerror or error}); {advice}") from error
