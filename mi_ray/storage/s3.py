"""S3 and compatible stores: Arrow's filesystem for the data, boto3 for conditional puts, which Arrow lacks."""

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

from mi_ray.config.section import split_query

ATTEMPTS = 8  # of one request, if the store is slow or answers 500 or 503; with growing pauses


def _parts(uri: str) -> tuple[str, str, tuple[str | None, str | None]]:
    """Bucket, key and (endpoint, region) of an s3:// URI. The latter two are in its query or in the environment."""
    path, query = split_query(uri.removeprefix("s3://"))
    bucket, _, key = path.partition("/")
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    endpoint, region = given.pop("endpoint_override", None), given.pop("region", None)
    scheme = given.pop("scheme", "https")
    if given:
        raise ValueError(
            f"the URI has the unknown query keys {', '.join(given)}; only endpoint_override, scheme and region are"
            " allowed"
        )
    if endpoint and "://" not in endpoint:
        endpoint = f"{scheme}://{endpoint}"
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return bucket, key.strip("/"), (endpoint or None, region)


@lru_cache
def _arrow(bucket: str, endpoint: str | None, region: str | None) -> pafs.S3FileSystem:
    """Arrow's filesystem. It retries with growing pauses if the store is slow or answers 500 or 503."""
    if not region and not endpoint:
        region = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        allow_delayed_open=True,  # a small file needs one put instead of three requests
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
    """Put an object atomically. It replaces an existing one.

    Arrow's streams are not used here: if an exception interrupts an upload, they complete it with the part so far.

    Raises:
        OSError: the store cannot be reached or refuses the request.
    """
    bucket, key, place = _parts(uri)
    try:
        if isinstance(content, bytes):
            _client(*place).put_object(Bucket=bucket, Key=key, Body=content)
        else:  # a multipart upload if it is large
            _client(*place).upload_fileobj(content, bucket, key)
    except (BotoCoreError, ClientError, S3UploadFailedError) as error:
        raise OSError(f"s3://{bucket}/{key} cannot be written: {error}") from error


def create(uri: str, content: bytes) -> bool:
    """Put an object if none of this name exists (`If-None-Match: *`). Returns whether it was put.

    Raises:
        OSError: the store cannot be reached or refuses the request.
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
        time.sleep(pause)  # 409: another writer is active, or an object of this name is being deleted
    return False
