"""How S3 is spoken to: the one place that makes a client, and the body it sends."""

import io
import ipaddress
import re
import warnings
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from urllib3.connection import HTTPConnection

from asyncckpt.errors import TransientStoreError
from asyncckpt.options import S3Options
from asyncckpt.store.base import Buffers, Progress, byte_views
from asyncckpt.store.s3_answers import judging
from asyncckpt.store.s3_credentials import Programs
from asyncckpt.store.s3_errors import remember
from asyncckpt.store.watch import answered, attend

CONNECTIONS = 32
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0  # of a connection that nobody watches: also bounds the sending of one piece of a body
WATCHED_TIMEOUT_S = 600.0  # a watch decides earlier
_PIECE_BYTES = 2**21
_SMALL_BYTES = 2**16


_SENT_SECRETS = (
    ("X-Amz-Security-Token", re.compile(r"(.+)")),
    ("Authorization", re.compile(r"Credential=([^/]+)/")),
)


class Expectation:
    """Whether `Expect: 100-continue` is sent with the next body.

    It saves sending a body that will be refused, and lets the refusal be read at all: a server that answers 403 and
    closes while we send is seen as a broken connection. It costs a round trip (a second, where a server does not know
    it). So it is sent until a body was accepted, and again after any failure.
    """

    def __init__(self) -> None:
        self.refusal = True
        self._known = True

    def apply(self, params: dict[str, Any], **_: object) -> None:
        """Handler of botocore's `before-call`, behind its own that sets the header."""
        if not (self.refusal and self._known):
            params["headers"].pop("Expect", None)

    def hear(self, response_dict: dict[str, Any], **_: object) -> None:
        """Handler of botocore's `before-parse`. 417: whoever answers does not know the header, and has not read the body."""
        if response_dict["status_code"] == 417:
            self._known = False
            refused = TransientStoreError(
                "the server, or a proxy before it, knows no `Expect: 100-continue`: sent without"
            )
            refused.unanswered = False
            raise refused


class _Attended(HTTPConnection):
    """A connection that says which socket the request of its thread goes over, so that a watch can look at it.

    botocore and urllib3 bound the sending of a piece by the timeout of connecting, and the answer from the moment when the last piece is in
    the kernel's buffer: on a thin link both are too early.
    """

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        self.sock.settimeout(self._timeout_s())
        super().send(data)

    def getresponse(self) -> Any:
        self.timeout = self._timeout_s()
        answer = super().getresponse()
        answered()
        return answer

    def _timeout_s(self) -> float:
        return WATCHED_TIMEOUT_S if attend(self.sock) else READ_TIMEOUT_S


class _Connection(_Attended, AWSHTTPConnection):  # type: ignore[misc]  # the mixture is botocore's own
    pass


class _TlsConnection(_Attended, AWSHTTPSConnection):  # type: ignore[misc]  # as above
    pass


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(AWSHTTPSConnectionPool):
    ConnectionCls = _TlsConnection


def _make_watchable(client: Any) -> None:
    """There is no public way to name the class of a client's connections. Without it the timeouts above hold."""
    with suppress(AttributeError):
        client._endpoint.http_session._pool_classes_by_scheme.update(http=_Pool, https=_TlsPool)


def make_client(options: S3Options, expectation: Expectation, programs: Programs | None = None) -> Any:
    """A client with one attempt a request: `RetryingStore` asks again, with a deadline instead of botocore's quota.

    A new session, so that credentials are looked up anew. Vendor errors pass: the caller maps them.
    """
    core = botocore.session.get_session()
    session = boto3.session.Session(profile_name=options.profile, region_name=options.region, botocore_session=core)
    (programs or Programs()).watch(core)
    client = session.client("s3", endpoint_url=options.endpoint_url, config=_config(options, options.endpoint_url))
    if options.endpoint_url is None and not _is_aws(client.meta.endpoint_url):  # AWS_ENDPOINT_URL_S3 or a profile's
        endpoint_url = client.meta.endpoint_url
        client.close()
        client = session.client("s3", config=_config(options, endpoint_url))
    _make_watchable(client)
    client.meta.events.register_last("before-call.s3", expectation.apply)
    client.meta.events.register_last("before-parse.s3", expectation.hear)
    client.meta.events.register_last("before-parse.s3", judging(client.meta.endpoint_url))
    client.meta.events.register_last("before-send.s3", _remember_sent)
    credentials = session.get_credentials()
    if credentials is not None and not isinstance(credentials, RefreshableCredentials):  # those may need a request
        remember(credentials.access_key, credentials.secret_key, credentials.token)
    _warn_of_plain_http(client.meta.endpoint_url)
    return client


def _remember_sent(request: Any, **_: object) -> None:
    """Credentials are renewed on the way: what was sent last may be echoed."""
    for header, secret in _SENT_SECRETS:
        value = request.headers.get(header, "")
        found = secret.search(value.decode("latin-1") if isinstance(value, bytes) else value)
        remember(found and found[1])


def signs_payload(client: Any) -> bool:
    """Whether the client sends a SHA-256 of each body, which S3 verifies."""
    return bool(client.meta.config.s3["payload_signing_enabled"])


def read_past_caches(client: Any) -> None:
    """Ask every cache on the way for the store's own answer. Not signed: a proxy may take the header for itself."""

    def ask(request: Any, **_: object) -> None:
        request.headers["Cache-Control"] = "no-cache"

    client.meta.events.register("before-send.s3", ask)


def _config(options: S3Options, endpoint_url: str | None) -> Config:
    sign_payload = options.sign_payload
    if sign_payload is None:
        sign_payload = _is_exposed(endpoint_url)
    style = options.addressing_style or ("virtual" if endpoint_url is None else "path")
    return Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=CONNECTIONS,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        tcp_keepalive=True,
        request_checksum_calculation="when_required",  # ours are in headers: a trailer costs more, and some stores refuse it
        response_checksum_validation="when_required",
        s3={"addressing_style": style, "payload_signing_enabled": sign_payload},
    )


def _is_aws(endpoint_url: str) -> bool:
    return (urlsplit(endpoint_url).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _is_exposed(endpoint_url: str | None) -> bool:
    """Whether others may read and change what is sent there: plain http to a host that is not loopback."""
    parts = urlsplit(endpoint_url or "https://")
    if parts.scheme != "http":
        return False
    host = parts.hostname or ""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost" and not host.endswith(".localhost")


def _warn_of_plain_http(endpoint_url: str) -> None:
    if _is_exposed(endpoint_url):
        host = urlsplit(endpoint_url).hostname
        warnings.warn(f"checkpoints travel to {host} over plain http, readable by others; use https", stacklevel=2)


def body_of(data: Buffers, progress: Progress) -> "bytes | Body":
    """What to send: a small body as bytes, for which nothing is asked beforehand."""
    body = Body(data, progress)
    return b"".join(byte_views(data)) if len(body) <= _SMALL_BYTES else body


class Body:
    """A list of buffers as the file that botocore sends. Joins only neighbours that are small.

    `read(n)` returns up to 2 MiB whatever positive `n` is asked for: urllib3 asks for 16 KiB at a time, and so many
    calls cost more CPU than all else in a request.
    """

    def __init__(self, data: Buffers, progress: Progress) -> None:
        self._views = byte_views(data)
        self._starts = [0, *accumulate(view.nbytes for view in self._views)]
        self._progress = progress
        self._at = 0
        self._number = 0  # of the view that byte `_at` is in

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, size: int = -1) -> bytes | memoryview:
        """The next bytes, as a view of the buffer where one holds enough of them."""
        self._progress()
        room = len(self) if size < 0 else max(size, _PIECE_BYTES) if size else 0
        pieces: list[memoryview] = []
        while room and self._number < len(self._views):
            view = self._views[self._number][self._at - self._starts[self._number] :][:room]
            if pieces and size >= 0 and view.nbytes >= _SMALL_BYTES:
                break
            pieces.append(view)
            room -= view.nbytes
            self.seek(self._at + view.nbytes)
            if size >= 0 and view.nbytes >= _SMALL_BYTES:
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, target: bytearray | memoryview) -> int:
        """Fill `target` as far as bytes are left; how many. The signer of awscrt reads so, and takes no more than it asked for."""
        self._progress()
        room = memoryview(target).cast("B")
        filled = 0
        while filled < room.nbytes and self._number < len(self._views):
            view = self._views[self._number][self._at - self._starts[self._number] :][: room.nbytes - filled]
            room[filled : filled + view.nbytes] = view
            filled += view.nbytes
            self.seek(self._at + view.nbytes)
        return filled

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As for files."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self)}[whence]
        self._at = min(max(base + offset, 0), len(self))
        self._number = bisect_right(self._starts, self._at) - 1
        return self._at

    def tell(self) -> int:
        """As for files."""
        return self._at
