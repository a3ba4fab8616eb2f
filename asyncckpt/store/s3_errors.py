"""Every failure of botocore and urllib3 as one of our errors: the type says what can be done, the message says how."""

import re
import ssl
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from traceback import walk_tb
from types import FrameType, TracebackType
from typing import Any
from urllib.parse import quote

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from asyncckpt.errors import (
    CheckpointError,
    ClockSkewError,
    CorruptCheckpointError,
    DiskFullError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAuthError,
    StoreError,
    StoreNotFoundError,
    TransientStoreError,
    UnsafeStoreError,
    UploadLostError,
)

_CODES: dict[type[StoreError], str] = {
    StoreAuthError: """
        AccessDenied AccessDeniedException AccountProblem AllAccessDisabled AuthFailure ExpiredToken
        ExpiredTokenException Forbidden InvalidAccessKeyId InvalidClientTokenId InvalidSecurity InvalidToken NotSignedUp
        RequestExpired SignatureDoesNotMatch TokenRefreshRequired Unauthorized UnauthorizedAccess
        UnrecognizedClientException""",
    TransientStoreError: """
        BadDigest BandwidthLimitExceeded ConditionalRequestConflict IncompleteBody InternalError InternalFailure
        OperationAborted PriorRequestNotComplete RequestLimitExceeded RequestThrottled RequestTimeout
        RequestTimeoutException ServiceUnavailable SlowDown SlowDownRead SlowDownWrite Throttling ThrottlingException
        TooManyRequests TooManyRequestsException XAmzContentChecksumMismatch XAmzContentSHA256Mismatch""",
    StoreNotFoundError: """
        AuthorizationHeaderMalformed IllegalLocationConstraintException IncorrectEndpoint NoSuchBucket PermanentRedirect
        TemporaryRedirect""",
    DiskFullError: "InsufficientStorage QuotaExceeded XMinioAdminBucketQuotaExceeded XMinioStorageFull",
    ClockSkewError: "RequestInTheFuture RequestTimeTooSkewed",
    ObjectNotFoundError: "NoSuchKey",
    UploadLostError: "InvalidPart NoSuchUpload",
    ObjectExistsError: "PreconditionFailed",
    StoreError: "InvalidObjectState NotImplemented",
}
_BY_CODE = {code: kind for kind, codes in _CODES.items() for code in codes.split()}
_BY_STATUS: dict[int, type[StoreError]] = {
    301: StoreNotFoundError,
    307: StoreNotFoundError,
    401: StoreAuthError,
    403: StoreAuthError,
    404: ObjectNotFoundError,
    408: TransientStoreError,
    409: TransientStoreError,
    412: ObjectExistsError,
    425: TransientStoreError,
    429: TransientStoreError,
    501: StoreError,
    507: DiskFullError,
}
_WAY_OUT: dict[type[StoreError], str] = {
    StoreAuthError: "check the credentials that botocore finds (environment, profile, instance role) and their policy"
    " (without s3:ListBucket, S3 refuses to say that a key is missing)",
    StoreNotFoundError: "check the bucket's name, its region and the endpoint",
    ClockSkewError: "set this host's clock (NTP)",
    DiskFullError: "free space or raise the quota",
    UploadLostError: "something ends uploads before they are complete: a lifecycle rule of the bucket, or another program",
}
_WIRE = (HTTPError, HTTPException, OSError)
_CONNECTION = (
    *(boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.FlexibleChecksumError),
    *(ResponseParserError, *_WIRE),  # XML that ends in the middle
)
_THEIRS = (boto.BotoCoreError, *_CONNECTION)  # whose text says enough without the type
_UNSENT = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)
_DONE_NOTHING = """
    BadDigest BandwidthLimitExceeded ConditionalRequestConflict IncompleteBody OperationAborted PriorRequestNotComplete
    RequestLimitExceeded RequestThrottled RequestTimeout RequestTimeoutException SlowDown SlowDownRead SlowDownWrite Throttling
    ThrottlingException TooManyRequests TooManyRequestsException XAmzContentChecksumMismatch XAmzContentSHA256Mismatch"""
_REFUSED = frozenset(_DONE_NOTHING.split())
"""Answers of S3 that say that nothing was done. With a status of 500 or more they prove nothing: a gateway may say so while it works."""
CHANGED = frozenset({"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"})
"""What arrived is not what was sent."""
_TOO_MUCH = frozenset({0, 408, 429, 503, 504})  # 0: there was no answer
_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.UnknownCredentialError,
    boto.NoAuthTokenError,
    boto.TokenRetrievalError,
    boto.SSOError,
    boto.ProfileNotFound,
    boto.ConfigParseError,
)
_SKEW_S = 15 * 60.0
_SECRET = re.compile(
    r"(?i)\b(?:A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA)[A-Z0-9]{12,}\b"
    r"|(?<=://)[^/\s@]+@"
    r"|\b(?:AQoD|FQoG|FwoG|IQoJ)[\w+/=%-]{12,}"  # as AWS begins its session tokens
    r"|\beyJ[\w-]{8,}\.[\w.-]+"  # a JSON web token
    r"|(?:X-Amz-(?:Signature|Credential|Security-Token)|(?:Proxy-)?Authorization|Signature|Credential|(?:session|security|auth).?token"
    r"|(?:secret.?)?access.?key(?:.?id)?|secret.?key|password|passwd)"
    r"(?:</?\w*>|['\"])*\s*[=:>]\s*['\"]?(?:(?:AWS4-HMAC-SHA256|AWS|Basic|Bearer|Digest|Token)\s+)?[^\s&,;'\"<>]+"
    r"|(?<=token)(?: is)?['\"\s:=]{1,4}[\w+/=%.-]{20,}"
)
_LEAST_CHARACTERS = 12  # of a credential that is looked for as it is: shorter ones may be words
_sent: deque[str] = deque(maxlen=64)  # they are renewed every hour or so


@contextmanager
def translated(operation: str, key: str, bucket: str = "") -> Iterator[None]:
    """Raise our error for any of theirs, also for a bug of a library below us; one of ours learns its key."""
    try:
        yield
    except CheckpointError as error:
        error.at(key=key)
        raise
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a library below us raises is the store's failure
        raise mapped(error, operation, key, bucket) from _redacted_cause(error)


def mapped(error: Exception, operation: str, key: str, bucket: str = "") -> StoreError | CorruptCheckpointError:
    """Our error for one of theirs. The code decides; where there is none (an answer to HEAD), the status does."""
    if isinstance(error, boto.ClientError):
        return _mapped_answer(error, operation, key, bucket)
    kind: type[StoreError] = StoreError
    way_out = ""
    if isinstance(error, _CREDENTIALS):
        kind, way_out = StoreAuthError, _WAY_OUT[StoreAuthError]
    elif isinstance(error, boto.NoRegionError):
        way_out = "set S3Options(region=...) or AWS_DEFAULT_REGION"
    elif _distrusts_certificate(error):
        way_out = "name the certificate's authority in AWS_CA_BUNDLE"
    elif isinstance(error, _CONNECTION) and not _is_mistake(error):
        kind = TransientStoreError
    elif _is_of_parser(error):
        kind, way_out = TransientStoreError, "this answer is not S3's"
    text = f"{operation}: {redact(str(error) if isinstance(error, _THEIRS) else f'{type(error).__name__}: {error}')}"
    found = kind(f"{text}; {way_out}" if way_out else text, key=key)
    found.unanswered = kind is TransientStoreError and not isinstance(error, _UNSENT)
    return found


def _mapped_answer(
    error: boto.ClientError, operation: str, key: str, bucket: str
) -> StoreError | CorruptCheckpointError:
    facts: dict[str, Any] = dict(error.response.get("Error", {}))
    about: dict[str, Any] = dict(error.response.get("ResponseMetadata", {}))
    code = code_of(error)
    status = int(about.get("HTTPStatusCode", 0))
    headers = about.get("HTTPHeaders", {})
    text = f"{operation}: {redact(str(facts.get('Message') or 'no message'))} ({redact(code) or status})"
    if code == "InvalidRange" or status == 416:
        return CorruptCheckpointError(f"{text}; the object is shorter than what refers to it", key=key)
    if code == "NoSuchBucket":
        text += f": {bucket or facts.get('BucketName') or 'unnamed'}"
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status) or (TransientStoreError if status >= 500 else StoreError)
    times = _skewed_times(facts, headers) if kind in (StoreAuthError, ClockSkewError) else None
    if times:
        kind = ClockSkewError
        text += f"; this host says {times[0]}, the store says {times[1]}"
    region = facts.get("Region") or headers.get("x-amz-bucket-region")
    if kind is StoreNotFoundError and region:
        return StoreNotFoundError(
            f"{text}; the bucket is in region {region}: set S3Options(region={region!r})", key=key
        )
    if code == "InvalidObjectState":
        text += "; the object is archived: restore it from the archive first"
    found = kind(f"{text}; {_WAY_OUT[kind]}" if kind in _WAY_OUT else text, key=key)
    refused = (code in _REFUSED or status == 429) and status < 500
    found.unanswered = kind is TransientStoreError and not refused
    return found


def unsafe(what: str, key: str) -> UnsafeStoreError:
    """The store does not compare before it changes something."""
    return UnsafeStoreError(
        f"this store {what}, so one of two writers could undo unseen what the other has just done; if there is only one, say"
        " S3Options(single_writer=True)",
        key=key,
    )


def code_of(error: BaseException | None) -> str:
    """The store's own word for an error; empty where it sent none and botocore put the status there."""
    if not isinstance(error, boto.ClientError):
        return ""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return "" if code.isdigit() else code


def status_of(error: BaseException | None) -> int:
    """The HTTP status of a vendor's error, 0 without."""
    if not isinstance(error, boto.ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def remember(*credentials: str | None) -> None:
    """These are sent, or known to the store: no message may hold them, whatever they look like."""
    for secret in credentials:
        if secret and len(secret) >= _LEAST_CHARACTERS and secret not in _sent:
            _sent.append(secret)


def slows_down(error: StoreError) -> bool:
    """Whether less should be sent at once: the store says so, or a connection died or timed out."""
    return isinstance(error, TransientStoreError) and status_of(error.__cause__) in _TOO_MUCH


def redact(text: str) -> str:
    """Take out every credential that was sent, and whatever looks like one: servers may echo what they got."""
    for secret in tuple(_sent):
        for form in (secret, quote(secret, safe="")):
            text = text.replace(form, "[redacted]")
    return _SECRET.sub("[redacted]", text)[:1000]


def _redacted_cause(error: Exception) -> Exception:
    """The error itself, its text free of credentials, and those that led to it: they are printed with ours.

    Frames of botocore hold the error that they raised, and the body: that would keep an arena in memory until somebody collects garbage.
    """
    todo: list[BaseException | None] = [error]
    done: set[int] = set()
    while todo:
        one = todo.pop()
        if one is None or id(one) in done:
            continue
        done.add(id(one))
        todo += [one.__cause__, one.__context__]
        _clear_frames(one.__traceback__)
        text = str(one)
        if redact(text) != text:
            one.args = (redact(text),)
        if isinstance(one, boto.ClientError):
            about = one.response.get("Error", {})
            one.response["Error"] = {name: redact(str(fact)) for name, fact in about.items()}  # type: ignore[typeddict-item]
    return error


def _clear_frames(trace: TracebackType | None) -> None:
    """As `traceback.clear_frames`, and those that called them too: botocore hands some errors on as values."""
    for frame, _ in walk_tb(trace):
        caller: FrameType | None = frame
        with suppress(RuntimeError):  # it runs, and so do those that called it
            while caller is not None:
                caller.clear()
                caller = caller.f_back


def _is_of_parser(error: Exception) -> bool:
    """Whether it was raised over an answer: a date or a number that is none, an element that is missing."""
    return any(frame.f_globals.get("__name__") == "botocore.parsers" for frame, _ in walk_tb(error.__traceback__))


def _is_mistake(error: Exception) -> bool:
    """Whether botocore's catch-all for the wire holds something that no network does."""
    return type(error) is boto.HTTPClientError and not isinstance(error.kwargs.get("error"), _WIRE)


def _distrusts_certificate(error: BaseException | None) -> bool:
    while isinstance(error, BaseException):
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        inner = error.kwargs.get("error") if isinstance(error, boto.BotoCoreError) else None
        inner = inner or next((one for one in error.args if isinstance(one, BaseException)), None)
        error = inner or error.__cause__
    return False


def _skewed_times(facts: dict[str, Any], headers: dict[str, str]) -> tuple[str, str] | None:
    """What both clocks say, if they differ by more than S3 accepts; the `Date` of a 403 tells even without a code."""
    if facts.get("RequestTime") and facts.get("ServerTime"):
        return str(facts["RequestTime"]), str(facts["ServerTime"])
    try:
        theirs = parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError):
        return None
    ours = datetime.now(UTC)
    return (ours.isoformat(), theirs.isoformat()) if abs((ours - theirs).total_seconds()) > _SKEW_S else None
