"""Every vendor error becomes one of ours: the type says what can be done."""

import ssl
from collections import deque
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import quote

import pytest
import urllib3.exceptions
from botocore import exceptions as boto

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
    UploadLostError,
    to_json,
)
from asyncckpt.store import s3_errors
from asyncckpt.store.s3_errors import _CODES, mapped, redact, remember, translated

KEY = "step-0000000001.json"
CODES = {
    "AccessDenied": StoreAuthError,
    "AccessDeniedException": StoreAuthError,
    "AccountProblem": StoreAuthError,
    "AllAccessDisabled": StoreAuthError,
    "AuthFailure": StoreAuthError,
    "ExpiredToken": StoreAuthError,
    "ExpiredTokenException": StoreAuthError,
    "Forbidden": StoreAuthError,
    "InvalidAccessKeyId": StoreAuthError,
    "InvalidClientTokenId": StoreAuthError,
    "InvalidSecurity": StoreAuthError,
    "InvalidToken": StoreAuthError,
    "NotSignedUp": StoreAuthError,
    "RequestExpired": StoreAuthError,
    "SignatureDoesNotMatch": StoreAuthError,
    "TokenRefreshRequired": StoreAuthError,
    "Unauthorized": StoreAuthError,
    "UnauthorizedAccess": StoreAuthError,
    "UnrecognizedClientException": StoreAuthError,
    "BadDigest": TransientStoreError,
    "BandwidthLimitExceeded": TransientStoreError,
    "ConditionalRequestConflict": TransientStoreError,
    "IncompleteBody": TransientStoreError,
    "InternalError": TransientStoreError,
    "InternalFailure": TransientStoreError,
    "OperationAborted": TransientStoreError,
    "PriorRequestNotComplete": TransientStoreError,
    "RequestLimitExceeded": TransientStoreError,
    "RequestThrottled": TransientStoreError,
    "RequestTimeout": TransientStoreError,
    "RequestTimeoutException": TransientStoreError,
    "ServiceUnavailable": TransientStoreError,
    "SlowDown": TransientStoreError,
    "SlowDownRead": TransientStoreError,
    "SlowDownWrite": TransientStoreError,
    "Throttling": TransientStoreError,
    "ThrottlingException": TransientStoreError,
    "TooManyRequests": TransientStoreError,
    "TooManyRequestsException": TransientStoreError,
    "XAmzContentChecksumMismatch": TransientStoreError,
    "XAmzContentSHA256Mismatch": TransientStoreError,
    "AuthorizationHeaderMalformed": StoreNotFoundError,
    "IllegalLocationConstraintException": StoreNotFoundError,
    "IncorrectEndpoint": StoreNotFoundError,
    "NoSuchBucket": StoreNotFoundError,
    "PermanentRedirect": StoreNotFoundError,
    "TemporaryRedirect": StoreNotFoundError,
    "InsufficientStorage": DiskFullError,
    "QuotaExceeded": DiskFullError,
    "XMinioAdminBucketQuotaExceeded": DiskFullError,
    "XMinioStorageFull": DiskFullError,
    "RequestInTheFuture": ClockSkewError,
    "RequestTimeTooSkewed": ClockSkewError,
    "NoSuchKey": ObjectNotFoundError,
    "NoSuchUpload": UploadLostError,
    "InvalidPart": UploadLostError,
    "PreconditionFailed": ObjectExistsError,
    "InvalidObjectState": StoreError,
    "NotImplemented": StoreError,
    "EntityTooLarge": StoreError,
    "InvalidRange": CorruptCheckpointError,
}
STATUSES = {
    301: StoreNotFoundError,
    307: StoreNotFoundError,
    400: StoreError,
    401: StoreAuthError,
    403: StoreAuthError,
    404: ObjectNotFoundError,
    408: TransientStoreError,
    409: TransientStoreError,
    412: ObjectExistsError,
    416: CorruptCheckpointError,
    425: TransientStoreError,
    429: TransientStoreError,
    500: TransientStoreError,
    501: StoreError,
    502: TransientStoreError,
    503: TransientStoreError,
    504: TransientStoreError,
    507: DiskFullError,
    520: TransientStoreError,
}
URL = "https://bucket.example/key"
EXCEPTIONS = [
    (boto.NoCredentialsError(), StoreAuthError),
    (boto.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"), StoreAuthError),
    (boto.CredentialRetrievalError(provider="process", error_msg="exit 1"), StoreAuthError),
    (boto.UnknownCredentialError(name="x"), StoreAuthError),
    (boto.NoAuthTokenError(), StoreAuthError),
    (boto.TokenRetrievalError(provider="sso", error_msg="x"), StoreAuthError),
    (boto.UnauthorizedSSOTokenError(), StoreAuthError),
    (boto.ProfileNotFound(profile="x"), StoreAuthError),
    (boto.ConfigParseError(path="x"), StoreAuthError),
    (boto.EndpointConnectionError(endpoint_url=URL), TransientStoreError),
    (boto.ConnectTimeoutError(endpoint_url=URL), TransientStoreError),
    (boto.ReadTimeoutError(endpoint_url=URL), TransientStoreError),
    (boto.ConnectionClosedError(endpoint_url=URL), TransientStoreError),
    (boto.ProxyConnectionError(proxy_url=URL), TransientStoreError),
    (boto.ResponseStreamingError(error="x"), TransientStoreError),
    (boto.HTTPClientError(error=ConnectionResetError(104, "reset")), TransientStoreError),
    (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), TransientStoreError),
    (boto.SSLError(endpoint_url=URL, error=ssl.SSLEOFError(8, "eof")), TransientStoreError),
    (urllib3.exceptions.ProtocolError("broken"), TransientStoreError),
    (urllib3.exceptions.ReadTimeoutError(None, URL, "slow"), TransientStoreError),  # type: ignore[arg-type]
    (ConnectionResetError(104, "reset"), TransientStoreError),
    (TimeoutError(), TransientStoreError),
    (boto.SSLError(endpoint_url=URL, error=ssl.SSLCertVerificationError(1, "self-signed")), StoreError),
    (boto.HTTPClientError(error=ZeroDivisionError("ours")), StoreError),
    (boto.NoRegionError(), StoreError),
    (boto.ParamValidationError(report="x"), StoreError),
    (boto.UnknownEndpointError(service_name="s3", region_name="x"), StoreError),
]


def answered(code: str, status: int, message: str = "said the store", **extra: object) -> boto.ClientError:
    headers = extra.pop("headers", {})
    error = {"Code": code, "Message": message, **extra}
    about = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    return boto.ClientError({"Error": error, "ResponseMetadata": about}, "PutObject")  # type: ignore[arg-type, typeddict-item]


@pytest.mark.parametrize("code", CODES)
def test_a_code_decides_the_type(code: str) -> None:
    error = mapped(answered(code, 400), "put_object", KEY)
    assert type(error) is CODES[code]
    assert error.key == KEY
    assert code in str(error)
    assert "put_object" in str(error)


def test_no_mapped_code_is_untested() -> None:
    in_the_table = {code for codes in _CODES.values() for code in codes.split()}
    assert in_the_table <= CODES.keys()


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("code", ["", "digits", "Unheard"])
def test_without_a_known_code_the_status_decides(status: int, code: str) -> None:
    error = mapped(answered(str(status) if code == "digits" else code, status), "head_object", KEY)
    assert type(error) is STATUSES[status]


@pytest.mark.parametrize(("theirs", "ours"), EXCEPTIONS, ids=lambda value: type(value).__name__)
def test_an_exception_of_the_vendor_becomes_ours(theirs: Exception, ours: type[CheckpointError]) -> None:
    with pytest.raises(CheckpointError) as caught, translated("put_object", KEY):
        raise theirs
    assert type(caught.value) is ours
    assert caught.value.__cause__ is theirs


def test_an_error_of_ours_passes() -> None:
    with pytest.raises(ObjectExistsError), translated("put_object", KEY):
        raise ObjectExistsError("x")


def test_clock_skew_names_both_times() -> None:
    theirs = answered("RequestTimeTooSkewed", 403, RequestTime="20260101T000000Z", ServerTime="2026-01-01T01:00:00Z")
    error = mapped(theirs, "put_object", KEY)
    assert isinstance(error, ClockSkewError)
    assert "20260101T000000Z" in str(error)
    assert "2026-01-01T01:00:00Z" in str(error)


@pytest.mark.parametrize(("ahead_s", "ours"), [(3600, ClockSkewError), (-3600, ClockSkewError), (60, StoreAuthError)])
def test_a_refusal_without_a_code_is_skew_if_the_clocks_differ(ahead_s: int, ours: type[StoreError]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead_s), usegmt=True)
    assert type(mapped(answered("403", 403, headers={"date": date}), "head_object", KEY)) is ours


def test_a_bucket_elsewhere_names_its_region() -> None:
    for theirs in (
        answered("PermanentRedirect", 301, headers={"x-amz-bucket-region": "eu-west-3"}),
        answered("AuthorizationHeaderMalformed", 400, Region="eu-west-3"),
        answered("301", 301, headers={"x-amz-bucket-region": "eu-west-3"}),
    ):
        error = mapped(theirs, "put_object", KEY)
        assert type(error) is StoreNotFoundError
        assert "S3Options(region='eu-west-3')" in str(error)


SECRETS = [
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
    "X-Amz-Signature=0123456789abcdef",
    "X-Amz-Security-Token=FwoGZXIvYXdzE",
    "X-Amz-Credential=AKID%2F20260101",
    "Authorization: AWS4-HMAC-SHA256 Credential=AKID/2026",
    "https://user:password@host/",
    "SessionToken: 'FwoGZXIvYXdzE'",
    "ABIAIOSFODNN7EXAMPLE",
    "FwoGZXIvYXdzENrSomeMoreOfIt+/==",
    "IQoJb3JpZ2luX2VjFwoGZXIvYXdzE",
    "token is 'FwoGZXIvYXdzE0123456789'",
    "eyJhbGciOiJIUzI1NiJ9.FwoGZXIvYXdzE.abc",
    "Authorization: Bearer FwoGZXIvYXdzE",
    "Authorization: AWS AKID:FwoGZXIvYXdzE",
    "Proxy-Authorization: Basic FwoGZXIvYXdzE==",
    "<X-Amz-Security-Token>FwoGZXIvYXdzE</X-Amz-Security-Token>",
    '"SecretAccessKey": "FwoGZXIvYXdzE"',
    "aws_secret_access_key = FwoGZXIvYXdzE",
    "https://h/k?AWSAccessKeyId=AKID&Signature=FwoGZXIvYXdzE&Expires=1",
    "AccessKeyId=AKID",
    "auth_token=FwoGZXIvYXdzE",
]
TELLING = ["IOSFODNN7", "0123456789", "FwoGZXIvYXdzE", "AKID", "user:password"]


@pytest.mark.parametrize("secret", SECRETS)
def test_no_credential_stands_in_a_message_or_its_cause(secret: str) -> None:
    theirs = [
        answered("InvalidAccessKeyId", 403, f"the key {secret} is unknown", AWSAccessKeyId="AKIAIOSFODNN7EXAMPLE"),
        boto.EndpointConnectionError(endpoint_url=f"https://h/?{secret}"),
        boto.CredentialRetrievalError(provider="process", error_msg=secret),
    ]
    for one in theirs:
        with pytest.raises(StoreError) as caught, translated("put_object", KEY):
            raise one
        told = f"{caught.value} {caught.value.__cause__} {to_json(caught.value)}"
        assert not any(word in told for word in TELLING), told


@pytest.mark.parametrize("secret", ["an-opaque/token+of=somebody", "0123456789abcdefghij"])
def test_what_was_sent_is_in_no_message_whatever_it_looks_like(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_errors, "_sent", deque(maxlen=64))
    assert secret in redact(f"the word {secret} has expired")
    remember(secret, None, "")
    for form in (secret, quote(secret, safe="")):
        assert form not in redact(f"the word {form} has expired")


def test_a_word_that_serves_as_a_credential_stays_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_errors, "_sent", deque(maxlen=64))
    remember("testing")
    assert redact("testing goes on") == "testing goes on"


def test_errors_that_led_to_one_hold_no_credential_either() -> None:
    """A traceback prints them all."""
    with pytest.raises(StoreError) as caught, translated("put_object", KEY):
        try:
            raise ValueError("X-Amz-Signature=0123456789abcdef")
        except ValueError:
            raise boto.EndpointConnectionError(endpoint_url="https://h/") from OSError(
                "Authorization: Bearer FwoGZXIvYXdzE"
            )
    cause = caught.value.__cause__
    assert cause is not None
    led_to_it = f"{cause} {cause.__cause__} {cause.__context__}"
    assert led_to_it.count("[redacted]") == 2
    assert not any(word in led_to_it for word in TELLING), led_to_it


def test_what_a_store_tells_beside_its_message_holds_no_credential() -> None:
    said = answered("SignatureDoesNotMatch", 403, CanonicalRequest="PUT\nx-amz-security-token:FwoGZXIvYXdzE\n")
    with pytest.raises(StoreAuthError), translated("put_object", KEY):
        raise said
    assert "FwoGZXIvYXdzE" not in str(said.response)


def test_a_missing_bucket_is_named() -> None:
    assert "NoSuchBucket): my-bucket;" in str(mapped(answered("NoSuchBucket", 404), "put_object", KEY, "my-bucket"))
    assert "NoSuchBucket): theirs;" in str(
        mapped(answered("NoSuchBucket", 404, BucketName="theirs"), "put_object", KEY)
    )


@pytest.mark.parametrize(
    "theirs", [ValueError("x"), TypeError("x"), KeyError("x"), AttributeError("x"), RuntimeError("x")]
)
def test_a_bug_below_us_is_a_store_error_that_names_its_type(theirs: Exception) -> None:
    """awscrt's signer raises such ones."""
    with pytest.raises(StoreError) as caught, translated("put_object", KEY):
        raise theirs
    assert type(caught.value) is StoreError
    assert type(theirs).__name__ in str(caught.value)
    assert caught.value.key == KEY


def test_redaction_keeps_what_is_no_secret() -> None:
    text = "put_object: Access Denied (AccessDenied) for s3://bucket/step-0000000001.json, signature does not match"
    assert redact(text) == text
