"""What a user may choose. Frozen, small, contradictions raise at once; a choice is never rewritten."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

StoredCodec = Literal["planes", "zstd", "none"]
Codec = Literal["auto"] | StoredCodec
WhenFull = Literal["wait", "skip", "raise"]
OnExists = Literal["skip", "raise"]
EngineName = Literal["service", "inline"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a store is asked again after transient failures.

    Args:
        deadline_s: Wall-clock seconds after which one request gives up (`DeadlineExceededError`). Ten minutes outlast
            most incidents of S3; botocore's own retries give up after 2.2 s of 503s. Also how long a service whose trainer is gone
            may last while none of its saves moves, clean-up included (at least 5 seconds).
        first_wait_s: Upper bound of the first wait; the bound doubles, each wait is drawn evenly below it ("full jitter").
        max_wait_s: The bound stops doubling here.
        first_contact_s: How long the first `save()` of a Saver waits for a listing, which tells whose checkpoints stand there.
    """

    deadline_s: float = 600.0
    first_wait_s: float = 0.1
    max_wait_s: float = 20.0
    first_contact_s: float = 15.0

    def __post_init__(self) -> None:
        if not 0 < self.first_wait_s <= self.max_wait_s:
            raise ValueError(f"need 0 < first_wait_s <= max_wait_s, not {self.first_wait_s} and {self.max_wait_s}")
        if self.deadline_s < 0:
            raise ValueError(f"deadline_s must not be negative, not {self.deadline_s}")
        if self.first_contact_s < 0:
            raise ValueError(f"first_contact_s must not be negative, not {self.first_contact_s}")


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where S3 is and how it is spoken to. Whatever is None comes from botocore's own chain.

    Args:
        endpoint_url: For S3-compatible stores; None is AWS or `AWS_ENDPOINT_URL_S3`.
        region: AWS region.
        profile: Profile of `~/.aws/config`; `credential_process` works too.
        addressing_style: `"path"`, `"virtual"`, or None: path for an endpoint_url, virtual otherwise.
        checksum: What each put carries so that the store refuses a body that changed on its way: `"crc32c"`, `"crc32"`, `"md5"`,
            `"none"`, or `"auto"`: the first of them that this store is found to verify, and nothing beside a signed payload. CRC32C
            costs 0.06 s of CPU a GB, CRC32 0.14, MD5 1.1.
        sign_payload: Sign the body too (SHA-256, 0.5 s of CPU a GB). Always signed over plain http to a host that is not loopback
            unless False is said. None: not signed over https and loopback.
        single_writer: Promise that only one process writes below this prefix; needed where the store ignores `If-None-Match`.
        retry: How long transient failures are retried.
    """

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    addressing_style: Literal["path", "virtual"] | None = None
    checksum: Literal["auto", "crc32c", "crc32", "md5", "none"] = "auto"
    sign_payload: bool | None = None
    single_writer: bool = False
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def __post_init__(self) -> None:
        choices = ("auto", "crc32c", "crc32", "md5", "none")
        if self.checksum not in choices:
            raise ValueError(f"checksum is one of {choices}, not {self.checksum!r}")

    def to_json(self) -> dict[str, Any]:
        """Plain data for the service; holds no credential."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "S3Options":
        """Mirror of `to_json`."""
        return cls(**{**data, "retry": RetryPolicy(**data["retry"])})


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Retention: keep the newest `count` checkpoints."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"KeepLast keeps at least 1 checkpoint, not {self.count}")


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Retention: keep every checkpoint whose step is a multiple of `steps`."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"KeepEvery needs steps >= 1, not {self.steps}")


KeepRule = KeepLast | KeepEvery


@dataclass(frozen=True, slots=True)
class Best:
    """Choose the checkpoint with the best `metric`; checkpoints without it do not compete, ties go to the newest."""

    metric: str
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f'mode is "min" or "max", not {self.mode!r}')

    def rank(self, metrics: Mapping[str, float]) -> float | None:
        """Lower is better; None does not compete (no such metric, or NaN)."""
        value = metrics.get(self.metric)
        if value is None or math.isnan(value):
            return None
        return value if self.mode == "min" else -value


StepChoice = int | Literal["latest"] | Best


def check_choices(**choices: Any) -> None:
    """`ValueError` for a word that is no choice of its option."""
    allowed = {
        "codec": ("auto", "planes", "zstd", "none"),
        "when_full": ("wait", "skip", "raise"),
        "on_exists": ("skip", "raise"),
        "engine": (None, "service", "inline"),
    }
    for name, choice in choices.items():
        if choice not in allowed[name]:
            raise ValueError(f"{name} is one of {allowed[name]}, not {choice!r}")


def check_rules(keep: Any) -> None:
    """`TypeError` unless it is a sequence of rules of retention."""
    if not isinstance(keep, list | tuple) or not all(isinstance(rule, KeepLast | KeepEvery) for rule in keep):
        raise TypeError(f"keep is a list of asyncckpt.KeepLast and asyncckpt.KeepEvery, not {keep!r}")
