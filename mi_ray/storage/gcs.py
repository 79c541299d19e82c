"""Google Cloud Storage: Arrow's filesystem for the data, Google's own client for what that lacks: uploads on a
condition, and folders in a list."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import BinaryIO
from urllib.parse import parse_qs

import pyarrow.fs as pafs

PATIENCE_S = 120  # a store that is slow, or answers 429 or 5xx, is asked again for so long; Google's client's own value


def _parts(uri: str) -> tuple[str, str, str | None]:
    """Bucket, key and endpoint of a gs:// URI: from its query, else from the environment, else None: Google's."""
    path, _, query = uri.removeprefix("gs://").partition("?")
    bucket, _, key = path.partition("/")
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    endpoint, scheme = given.pop("endpoint_override", None), given.pop("scheme", "https")
    if given:
        raise ValueError(f"the URI's query says {', '.join(given)}; it may say endpoint_override and scheme")
    if not endpoint:
        endpoint, scheme = os.environ.get("STORAGE_EMULATOR_HOST"), "http"
    if endpoint and "://" not in endpoint:
        endpoint = f"{scheme}://{endpoint}"
    return bucket, key.strip("/"), endpoint.rstrip("/") if endpoint else None


def _is_emulator(endpoint: str | None) -> bool:
    """Google's own endpoints speak https alone: what does not is sent no credentials."""
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
        ValueError: it is not installed.
        OSError: there are no credentials.
    """
    try:
        from google.auth.credentials import AnonymousCredentials
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage import Client
    except ImportError as error:
        raise ValueError("gs:// needs google-cloud-storage: pip install 'mi-ray[gcp]'") from error
    credentials = AnonymousCredentials() if _is_emulator(endpoint) else None
    options = {"api_endpoint": endpoint} if endpoint else None
    try:
        return Client(project=None, credentials=credentials, client_options=options)
    except GoogleAuthError as error:
        raise OSError(f"no credentials for Google Cloud Storage: {error}") from error


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Errors of Google's client as OSErrors."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (GoogleAPIError, GoogleAuthError) as error:
        raise OSError(f"{uri}: {error}") from error


def filesystem(uri: str) -> tuple[pafs.GcsFileSystem, str]:
    """Arrow's filesystem of a gs:// URI, and the path on it.

    Raises:
        ValueError: Google's client, without which nothing can be written, is not installed.
        OSError: there are no credentials.
    """
    bucket, key, endpoint = _parts(uri)
    _client(endpoint)  # tells at once of missing credentials, which Arrow looks for until its patience ends
    return _arrow(endpoint), f"{bucket}/{key}".rstrip("/")


def put(uri: str, content: bytes | BinaryIO):
    """Upload an object in the place of what is there, whole or not at all.

    Raises:
        OSError: the store cannot be reached or refuses.
    """
    bucket, key, endpoint = _parts(uri)
    client = _client(endpoint)
    from google.cloud.storage.retry import DEFAULT_RETRY

    with _told(f"gs://{bucket}/{key} cannot be written"):
        blob = client.bucket(bucket).blob(key)
        how = {"content_type": "application/octet-stream", "timeout": (10, 60), "retry": DEFAULT_RETRY}
        if isinstance(content, bytes):
            blob.upload_from_string(content, **how)
        else:
            blob.upload_from_file(content, size=os.fstat(content.fileno()).st_size, **how)


def create(uri: str, content: bytes) -> bool:
    """Upload an object unless there is one of that name (`ifGenerationMatch=0`); whether it was uploaded.

    Raises:
        OSError: the store cannot be reached or refuses.
    """
    bucket, key, endpoint = _parts(uri)
    client = _client(endpoint)
    from google.api_core.exceptions import PreconditionFailed

    with _told(f"gs://{bucket}/{key} cannot be written"):
        try:
            blob = client.bucket(bucket).blob(key)
            blob.upload_from_string(content, "application/octet-stream", if_generation_match=0, timeout=(10, 60))
        except PreconditionFailed:
            return False
    return True


def list_names(uri: str) -> list[str]:
    """Names of the objects and folders in a folder, sorted. Arrow tells only those folders that it made itself.

    Raises:
        OSError: the store cannot be reached or refuses.
    """
    bucket, key, endpoint = _parts(uri)
    client, prefix = _client(endpoint), f"{key}/" if key else ""
    fields = "items(name),prefixes,nextPageToken"
    with _told(f"gs://{bucket}/{key} cannot be listed"):
        objects = client.list_blobs(bucket, prefix=prefix, delimiter="/", fields=fields, timeout=(10, 60))
        names = {found.name for found in objects} | objects.prefixes  # the latter are whole after the former only
    return sorted({name.removeprefix(prefix).rstrip("/") for name in names} - {""})
