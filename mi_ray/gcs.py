"""Google Cloud Storage: Arrow's filesystem for the data, Google's client for the conditional writes that it lacks."""

import os
from datetime import timedelta
from functools import lru_cache
from urllib.parse import parse_qs

import pyarrow.fs as pafs

PATIENCE_S = 120  # a store that is slow, or answers 429, 500 or 503, is asked again so long


def _parts(uri: str) -> tuple[str, str, str | None]:
    """Bucket, key and endpoint of a gs:// URI: the last from its query, else from the environment; None: Google's."""
    path, _, query = uri.removeprefix("gs://").partition("?")
    bucket, _, key = path.partition("/")
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    endpoint, scheme = given.pop("endpoint_override", None), given.pop("scheme", "https")
    if given:
        raise ValueError(f"the URI's query says {', '.join(given)}; it may say endpoint_override and scheme")
    endpoint = endpoint or os.environ.get("STORAGE_EMULATOR_HOST")
    if endpoint and "://" not in endpoint:
        endpoint = f"{scheme}://{endpoint}"
    return bucket, key.strip("/"), endpoint or None


@lru_cache
def _arrow(endpoint: str | None) -> pafs.GcsFileSystem:
    patience = timedelta(seconds=PATIENCE_S)
    if endpoint is None:
        return pafs.GcsFileSystem(retry_time_limit=patience)
    scheme, _, place = endpoint.partition("://")  # an emulator, which asks nobody who he is
    return pafs.GcsFileSystem(anonymous=True, scheme=scheme, endpoint_override=place, retry_time_limit=patience)


@lru_cache
def _client(endpoint: str | None):
    try:
        from google.auth.credentials import AnonymousCredentials
        from google.cloud.storage import Client
    except ImportError as error:
        raise ValueError(f"gs:// needs Google's client ({error}): pip install 'mi-ray[gcp]'") from error
    if endpoint is None:
        return Client()
    return Client("none", AnonymousCredentials(), client_options={"api_endpoint": endpoint})


def filesystem(uri: str) -> tuple[pafs.GcsFileSystem, str]:
    """Arrow's filesystem of a gs:// URI, and the path on it."""
    bucket, key, endpoint = _parts(uri)
    return _arrow(endpoint), f"{bucket}/{key}".rstrip("/")


def create(uri: str, content: bytes) -> bool:
    """Put an object unless there is one of that name (`ifGenerationMatch=0`); whether it was put.

    Raises:
        OSError: the store cannot be reached or refuses.
        ValueError: Google's client is not installed.
    """
    bucket, key, endpoint = _parts(uri)
    client = _client(endpoint)
    from google.api_core.exceptions import GoogleAPIError, PreconditionFailed
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.retry import DEFAULT_RETRY
    from requests.exceptions import RequestException

    blob, patient = client.bucket(bucket).blob(key), DEFAULT_RETRY.with_timeout(PATIENCE_S)
    try:
        blob.upload_from_string(content, if_generation_match=0, retry=patient, timeout=60)
    except PreconditionFailed:
        return False
    except (GoogleAPIError, GoogleAuthError, RequestException) as error:
        raise OSError(f"gs://{bucket}/{key} cannot be written: {error}") from error
    return True
