"""Objects below a prefix of a place's bucket: counted and deleted by a client of the harness, outside of all timing."""

from collections.abc import Iterator
from typing import Any

import boto3
from botocore.config import Config

from benchmarks.stores.base import Place


def client(place: Place) -> Any:
    """A client for the place's endpoint."""
    config = Config(s3={"addressing_style": "path"}, max_pool_connections=32)
    # a session of its own: the default one keeps the credentials that it met first
    return boto3.Session().client("s3", endpoint_url=place.endpoint_url, region_name=place.region, config=config)


def bytes_at(place: Place, prefix: str) -> int:
    """Bytes of all objects whose keys begin so, below the place."""
    return sum(item["Size"] for item in _listed(place, prefix))


def delete_at(place: Place, prefix: str) -> None:
    """Delete all objects whose keys begin so, below the place."""
    held = client(place)
    keys = [{"Key": item["Key"]} for item in _listed(place, prefix)]
    for at in range(0, len(keys), 1000):
        answer = held.delete_objects(Bucket=place.bucket, Delete={"Objects": keys[at : at + 1000], "Quiet": True})
        if answer.get("Errors"):
            raise RuntimeError(f"not deleted: {answer['Errors'][0]}")
    held.close()


def key_of(place: Place, name: str) -> str:
    """The key of an object below the place."""
    return f"{place.prefix}/{name}"


def _listed(place: Place, prefix: str) -> Iterator[dict[str, Any]]:
    held = client(place)
    for page in held.get_paginator("list_objects_v2").paginate(Bucket=place.bucket, Prefix=key_of(place, prefix)):
        yield from page.get("Contents", ())
    held.close()
