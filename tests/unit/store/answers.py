"""Answers that a real server cannot be made to give, put in botocore's `before-send` hook."""

import io
from collections.abc import Callable, Iterator
from typing import Any

from botocore.awsrequest import AWSResponse, HeadersDict

from asyncckpt.store.s3 import S3Store


class _Raw(io.BytesIO):
    def stream(self, *_: object, **__: object) -> Iterator[bytes]:
        while piece := self.read(8192):
            yield piece


def answer(status: int, body: str = "", headers: dict[str, str] | None = None) -> AWSResponse:
    return AWSResponse("http://faked/", status, HeadersDict(headers or {}), _Raw(body.encode()))


def refusal(status: int, code: str, message: str = "said the store", extra: str = "") -> AWSResponse:
    return answer(status, f"<Error><Code>{code}</Code><Message>{message}</Message>{extra}</Error>")


def intercept(store: S3Store, operation: str, handler: Callable[[Any], AWSResponse | None]) -> None:
    """Ask `handler` with each request of `operation` ("PutObject"); None lets it go to the server."""

    def before_send(request: Any, **_: object) -> AWSResponse | None:
        return handler(request)

    store._client().meta.events.register(f"before-send.s3.{operation}", before_send)
