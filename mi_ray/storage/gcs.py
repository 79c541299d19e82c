"""Google Cloud Storage: Arrow's filesystem for the data. Google's client for conditional uploads and for listing
folders, which Arrow's filesystem lacks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import BinaryIO
from urllib.parse import parse_qs

import pyarrow.fs as pafs

from mi_ray.config.section import split_query
from mi_ray.storage import endpoints

# Requests are retried for this time if the store is slow or answers 429 or 5xx. Default of Google's client.
PATIENCE_S = 120


def _parts(uri: str) -> tuple[str, str, str | None]:
    """Bucket, key and endpoint of a gs:// URI. The endpoint is in its query or the environment; None: Google's."""
    path, query = split_query(uri.removeprefix("gs://"))
    bucket, _, key = path.partition("/")
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    endpoint, scheme = given.pop("endpoint_override", None), given.pop("scheme", "https")
    if given:
        raise ValueError(
            f"the URI has the unknown query keys {', '.join(given)}; only endpoint_override and scheme are allowed"
        )
    if not endpoint:
        endpoint, scheme = os.environ.get("STORAGE_EMULATOR_HOST"), "http"
    if endpoint and "://" not in endpoint:
        endpoint = f"{scheme}://{endpoint}"
    return bucket, key.strip("/"), endpoint.rstrip("/") if endpoint else None


def _is_emulator(endpoint: str | None) -> bool:
    """Whether the endpoint is an emulator, which gets no credentials: Google's own endpoints use https only."""
    return endpoint is not None and endpoint.startswith("http://")


@lru_cache
def _arrow(endpoint: str | None) -> pafs.GcsFileSystem:
    scheme, _, host = endpoint.partition("://") if endpoint else (None, None, None)
    return pafs.GcsFileSystem(
        anonymous=_is_emulator(endpoint),
        scheme=scheme,
        endpoint_override=host,
        retry_time_limit=timedelta(seconds=PATIENCE_S),
    )


@lru_cache
def _client(endpoint: str | None):
    """Google's client, with the credentials of the environment or of the machine's service account.

    Raises:
        ValueError: the client is not installed.
        OSError: there are no credentials.
    """
    try:
        from google.auth.credentials import AnonymousCredentials
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage import Client
    except ImportError as error:
        raise ValueError(
            "google-cloud-storage is not installed, and gs:// needs it: pip install 'mi-ray[gcp]'"
        ) from error
    credentials = AnonymousCredentials() if _is_emulator(endpoint) else None
    options = {"api_endpoint": endpoint} if endpoint else None
    try:
        return Client(project=None, credentials=credentials, client_options=options)
    except GoogleAuthError as error:
        raise OSError(
            f"there are no credentials for Google Cloud Storage ({error}); set them in the environment"
        ) from error


@contextmanager
def _as_os_error(uri: str) -> Iterator[None]:
    """Raise errors of Google's client as OSError."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (GoogleAPIError, GoogleAuthError) as error:
        raise OSError(f"{uri}: {error}") from error


def filesystem(uri: str) -> tuple[pafs.GcsFileSystem, str]:
    """Arrow's filesystem of a gs:// URI, and the path on it.

    Raises:
        ValueError: Google's client is not installed. Writing needs it.
        OSError: there are no credentials.
    """
    bucket, key, endpoint = _parts(uri)
    _client(endpoint)  # raises at once if credentials are missing; Arrow would search for them until its time limit
    return _arrow(endpoint), f"{bucket}/{key}".rstrip("/")


def check_reachable(uri: str):
    """Check that an endpoint other than Google's answers.

    Raises:
        OSError: it does not.
    """
    _, _, endpoint = _parts(uri)
    if endpoint:
        endpoints.check_reachable(endpoint)


def put(uri: str, content: bytes | BinaryIO):
    """Upload an object atomically. It replaces an existing one.

    Raises:
        OSError: the store cannot be reached or refuses the request.
    """
    bucket, key, endpoint = _parts(uri)
    client = _client(endpoint)
    from google.cloud.storage.retry import DEFAULT_RETRY

    with _as_os_error(f"gs://{bucket}/{key} cannot be written"):
        blob = client.bucket(bucket).blob(key)
        how = {"content_type": "application/octet-stream", "timeout": (10, 60), "retry": DEFAULT_RETRY}
        if isinstance(content, bytes):
            blob.upload_from_string(content, **how)
        else:
            blob.upload_from_file(content, size=os.fstat(content.fileno()).st_size, **how)


def create(uri: str, content: bytes) -> bool:
    """Upload an object if none of this name exists (`ifGenerationMatch=0`). Returns whether it was uploaded.

    Raises:
        OSError: the store cannot be reached or refuses the request.
    """
    bucket, key, endpoint = _parts(uri)
    client = _client(endpoint)
    from google.api_core.exceptions import PreconditionFailed

    with _as_os_error(f"gs://{bucket}/{key} cannot be written"):
        try:
            blob = client.bucket(bucket).blob(key)
            blob.upload_from_string(content, "application/octet-stream", if_generation_match=0, timeout=(10, 60))
        except PreconditionFailed:
            return False
    return True


def list_names(uri: str) -> list[str]:
    """Names of the objects and folders in a folder, sorted. Arrow lists only folders that it made itself.

    Raises:
        OSError: the store cannot be reached or refuses the request.
    """
    bucket, key, endpoint = _parts(uri)
    client, prefix = _client(endpoint), f"{key}/" if key else ""
    fields = "items(name),prefixes,nextPageToken"
    with _as_os_error(f"gs://{bucket}/{key} cannot be listed"):
        objects = client.list_blobs(bucket, prefix=prefix, delimiter="/", fields=fields, timeout=(10, 60))
        names = {found.name for found in objects} | objects.prefixes  # prefixes are complete only after the iteration
    return sorted({name.removeprefix(prefix).rstrip("/") for name in names} - {""})
