"""S3 and compatible stores: Arrow's filesystem for the data, boto3 for conditional puts, which Arrow lacks."""

import os
import time
from functools import lru_cache
from typing import BinaryIO, NamedTuple
from urllib.parse import parse_qs

import boto3
import pyarrow.fs as pafs
from boto3.exceptions import S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from mi_ray.config.section import split_query
from mi_ray.storage import endpoints

ATTEMPTS = 8  # of one request, if the store is slow or answers 500 or 503; with growing pauses


class _Place(NamedTuple):
    """Where a bucket is. None: AWS's own endpoint, the bucket's region."""

    endpoint: str | None
    region: str | None
    virtual: bool = False  # the bucket's name is in the host's name, not in the path


def _parts(uri: str) -> tuple[str, str, _Place]:
    """Bucket, key and place of an s3:// URI. The place is in its query or in the environment."""
    path, query = split_query(uri.removeprefix("s3://"))
    bucket, _, key = path.partition("/")
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    endpoint, region = given.pop("endpoint_override", None), given.pop("region", None)
    scheme, virtual = given.pop("scheme", "https"), given.pop("force_virtual_addressing", "false").lower()
    if given or virtual not in ("true", "false"):
        wrong = f"the unknown query keys {', '.join(given)}" if given else f"force_virtual_addressing={virtual}"
        raise ValueError(
            f"the URI has {wrong}; allowed are endpoint_override, scheme, region, and force_virtual_addressing=true or"
            " false"
        )
    if endpoint and "://" not in endpoint:
        endpoint = f"{scheme}://{endpoint}"
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return bucket, key.strip("/"), _Place(endpoint or None, region, virtual == "true")


def check_reachable(uri: str):
    """Check that a compatible store answers.

    Raises:
        OSError: it does not.
    """
    _, _, place = _parts(uri)
    if place.endpoint:
        endpoints.check_reachable(place.endpoint)


def _leave_out_what_is_optional(place: _Place):
    """Compatible stores may not know checksums, which AWS's clients send by default. Both clients read the environment;
    what the user sets there counts."""
    if place.endpoint:
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")


@lru_cache
def _arrow(bucket: str, place: _Place) -> pafs.FileSystem:
    """Arrow's filesystem. It retries with growing pauses if the store is slow or answers 500 or 503."""
    if place.endpoint:
        return pafs.PyFileSystem(Compatible(place))
    return _arrow_s3(place._replace(region=place.region or pafs.resolve_s3_region(bucket)))


def _arrow_s3(place: _Place) -> pafs.S3FileSystem:
    optional = {"force_virtual_addressing": True} if place.virtual else {}
    if bundle := os.environ.get("AWS_CA_BUNDLE"):  # boto3 reads it by itself
        optional["tls_ca_file_path"] = bundle
    return pafs.S3FileSystem(
        endpoint_override=place.endpoint,
        region=place.region,
        allow_delayed_open=True,  # a small file needs one put instead of three requests
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        **optional,
    )


class Compatible(pafs.FileSystemHandler):
    """Arrow's filesystem for a compatible store, without what such stores may lack: optional checksums, also in other
    processes that receive it, and the request that deletes many objects, which needs a checksum."""

    def __init__(self, place: _Place):
        _leave_out_what_is_optional(place)
        self.place, self.system = place, _arrow_s3(place)

    def __reduce__(self):
        return Compatible, (self.place,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compatible) and other.place == self.place

    def __ne__(self, other: object) -> bool:
        return not self == other

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return self.system.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return self.system.get_file_info(paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self.system.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool):
        self.system.create_dir(path, recursive=recursive)

    def delete_file(self, path: str):
        self.system.delete_file(path)

    def move(self, source: str, target: str):
        self.system.move(source, target)

    def copy_file(self, source: str, target: str):
        self.system.copy_file(source, target)

    def open_input_stream(self, path: str):
        return self.system.open_input_stream(path, compression=None)

    def open_input_file(self, path: str):
        return self.system.open_input_file(path)

    def open_output_stream(self, path: str, metadata: dict):
        return self.system.open_output_stream(path, compression=None, metadata=metadata)

    def open_append_stream(self, path: str, metadata: dict):
        return self.system.open_append_stream(path, compression=None, metadata=metadata)

    def delete_dir(self, path: str):
        self._delete_all(path, {"Prefix": f"{path.partition('/')[2]}/"})

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False):
        prefix = f"{path.partition('/')[2]}/"  # an object of this name may stand for the folder itself
        self._delete_all(path, {"Prefix": prefix, "StartAfter": prefix})

    def _delete_all(self, path: str, which: dict[str, str]):
        bucket, client = path.partition("/")[0], _client(self.place)
        try:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, **which):
                for found in page.get("Contents", ()):
                    client.delete_object(Bucket=bucket, Key=found["Key"])
        except (BotoCoreError, ClientError) as error:
            raise OSError(f"s3://{path} cannot be deleted: {error}") from error

    def delete_root_dir_contents(self):
        raise NotImplementedError("a bucket is not emptied")


@lru_cache
def _client(place: _Place):
    _leave_out_what_is_optional(place)
    patience = {"retries": {"mode": "standard", "max_attempts": ATTEMPTS}, "connect_timeout": 10, "read_timeout": 60}
    style = {"s3": {"addressing_style": "virtual"}} if place.virtual else {}
    config = Config(**patience, **style)
    return boto3.client("s3", endpoint_url=place.endpoint, region_name=place.region, config=config)


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Arrow's filesystem of an s3:// URI, and the path on it."""
    bucket, key, place = _parts(uri)
    return _arrow(bucket, place), f"{bucket}/{key}".rstrip("/")


def put(uri: str, content: bytes | BinaryIO):
    """Put an object atomically. It replaces an existing one.

    Arrow's streams are not used here: if an exception interrupts an upload, they complete it with the part so far.

    Raises:
        OSError: the store cannot be reached or refuses the request.
    """
    bucket, key, place = _parts(uri)
    try:
        if isinstance(content, bytes):
            _client(place).put_object(Bucket=bucket, Key=key, Body=content)
        else:  # a multipart upload if it is large
            _client(place).upload_fileobj(content, bucket, key)
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
            _client(place).put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
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
