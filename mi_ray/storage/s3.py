"""S3 and what speaks like it: Arrow's filesystem for the data, boto3 for the conditional puts that it lacks."""

import os
import time
from functools import lru_cache
from typing import BinaryIO
from urllib.parse import parse_qs

import boto3
import pyarrow.fs as pafs
from boto3.exceptions import S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ATTEMPTS = 8  # the pauses between them grow; a store that is slow, or answers 500 or 503, is asked again


def _parts(uri: str) -> tuple[str, str, tuple[str | None, str | None]]:
    """Bucket, key and (endpoint, region) of an s3:// URI: from its query, else from the environment."""
    path, _, query = uri.removeprefix("s3://").partition("?")
    bucket, _, key = path.partition("/")
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    endpoint, region = given.pop("endpoint_override", None), given.pop("region", None)
    scheme = given.pop("scheme", "https")
    if given:
        raise ValueError(f"the URI's query says {', '.join(given)}; it may say endpoint_override, scheme and region")
    if endpoint and "://" not in endpoint:
        endpoint = f"{scheme}://{endpoint}"
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return bucket, key.strip("/"), (endpoint or None, region)


@lru_cache
def _arrow(bucket: str, endpoint: str | None, region: str | None) -> pafs.S3FileSystem:
    """A store that is slow, or answers 500 or 503, is asked again with growing pauses."""
    if not region and not endpoint:
        region = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        allow_delayed_open=True,  # a small file is one put, not three requests
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


@lru_cache
def _client(endpoint: str | None, region: str | None):
    patience = Config(retries={"mode": "standard", "max_attempts": ATTEMPTS}, connect_timeout=10, read_timeout=60)
    return boto3.client("s3", endpoint_url=endpoint, region_name=region, config=patience)


def filesystem(uri: str) -> tuple[pafs.S3FileSystem, str]:
    """Arrow's filesystem of an s3:// URI, and the path on it."""
    bucket, key, place = _parts(uri)
    return _arrow(bucket, *place), f"{bucket}/{key}".rstrip("/")


def put(uri: str, content: bytes | BinaryIO):
    """Put an object in the place of what is there, whole or not at all. Arrow's streams end an upload that an exception
    interrupts as if it were complete.

    Raises:
        OSError: the store cannot be reached or refuses.
    """
    bucket, key, place = _parts(uri)
    try:
        if isinstance(content, bytes):
            _client(*place).put_object(Bucket=bucket, Key=key, Body=content)
        else:  # in pieces if it is large
            _client(*place).upload_fileobj(content, bucket, key)
    except (BotoCoreError, ClientError, S3UploadFailedError) as error:
        raise OSError(f"s3://{bucket}/{key} cannot be written: {error}") from error


def create(uri: str, content: bytes) -> bool:
    """Put an object unless there is one of that name (`If-None-Match: *`); whether it was put.

    Raises:
        OSError: the store cannot be reached or refuses.
    """
    bucket, key, place = _parts(uri)
    for pause in (0.1, 0.5, 2.0, None):
        try:
            _client(*place).put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
            return True
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 412:
                return False
            if status != 409 or pause is None:
                raise OSError(f"s3://{bucket}/{key} cannot be written: {error}") from error
        except BotoCoreError as error:
            raise OSError(f"s3://{bucket}/{key} cannot be written: {error}") from error
        time.sleep(pause)  # 409: another writer is at it, or an object of that name is being deleted
    return False
