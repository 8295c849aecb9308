"""s3://BUCKET/KEY, taken apart."""

from __future__ import annotations

import pytest

from trimtab_store import Location, parse_uri
from trimtab_store.errors import UriInvalid


@pytest.mark.parametrize(
    ("uri", "bucket", "key", "folder"),
    [
        ("s3://models/llama", "models", "llama", "llama/"),
        ("s3://models/a/b.txt", "models", "a/b.txt", "a/b.txt/"),
        ("s3://models/a/", "models", "a/", "a/"),
        ("s3://models", "models", "", ""),
        ("s3://models/", "models", "", ""),
        ("s3://my.bucket-1//odd", "my.bucket-1", "odd", "odd/"),
    ],
)
def test_parts(uri: str, bucket: str, key: str, folder: str) -> None:
    assert parse_uri(uri) == Location(bucket, key)
    assert parse_uri(uri).folder == folder


@pytest.mark.parametrize(
    "uri", ["", "models/llama", "http://models/llama", "s3://", "s3:///key", "s3://A/b", "s3://a_b/c"]
)
def test_what_is_no_uri_is_refused_with_an_example(uri: str) -> None:
    with pytest.raises(UriInvalid, match="write s3://BUCKET/KEY") as caught:
        parse_uri(uri)
    assert caught.value.uri == uri
