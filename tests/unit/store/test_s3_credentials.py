"""A `credential_process` that hangs is ended in time, and named."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import botocore.session
import pytest
from botocore.exceptions import CredentialRetrievalError

from asyncckpt.errors import StoreAuthError
from asyncckpt.options import S3Options
from asyncckpt.store.s3 import S3Store
from asyncckpt.store.s3_credentials import Programs
from tests.processes import alive, eventually

GOOD = (
    '{"Version": 1, "AccessKeyId": "AKIDOFAPROGRAM", "SecretAccessKey": "secret", "Expiration": "2099-01-01T00:00:00Z"}'
)


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes profiles: `own` names a program, `role` takes a role with the credentials of `own`. Gives the file of its process ids."""

    def make(script: str) -> Path:
        program, pids, config = tmp_path / "program.sh", tmp_path / "pids", tmp_path / "config"
        program.write_text(f"#!/bin/sh\necho $$ >> {pids}\n{script}\n")
        program.chmod(0o755)
        config.write_text(
            f"[profile own]\ncredential_process={program} --password hunter2hunter2\n"
            "[profile role]\nrole_arn=arn:aws:iam::1:role/r\nsource_profile=own\n"
        )
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        return pids

    return make


def credentials(programs: Programs, name: str) -> object:
    session = programs.watch(botocore.session.Session(profile=name))
    found = session.get_credentials()
    assert found is not None
    return found.get_frozen_credentials()


@pytest.mark.parametrize("name", ["own", "role"])
@pytest.mark.parametrize("script", ["exec sleep 100", "sleep 100 & echo $! >> pids; wait"])
def test_a_program_that_hangs_is_ended_and_named_and_nothing_of_it_is_left(
    profile: Callable[[str], Path], name: str, script: str
) -> None:
    pids = profile(script.replace("pids", "$(dirname $0)/pids"))
    beats: list[int] = []
    with pytest.raises(CredentialRetrievalError, match=r"program\.sh' gave no answer for 0\.3 s") as caught:
        credentials(Programs(lambda: beats.append(1), patience_s=0.3), name)
    assert "hunter2" not in str(caught.value)
    assert beats  # it is waited for: a worker is not taken for hung meanwhile
    started = list(map(int, pids.read_text().split()))
    eventually(lambda: not any(map(alive, started)), "everything that it started has ended")


def test_a_program_that_answers_is_believed(profile: Callable[[str], Path]) -> None:
    profile(f"sleep 0.1; echo '{GOOD}'")
    assert credentials(Programs(patience_s=30), "own").access_key == "AKIDOFAPROGRAM"  # type: ignore[attr-defined]


def test_all_who_wait_for_one_program_wait_once(
    profile: Callable[[str], Path], moto_endpoint: str, s3_bucket: str
) -> None:
    pids = profile("exec sleep 100")
    errors: list[StoreAuthError] = []
    with S3Store(s3_bucket, "run", S3Options(endpoint_url=moto_endpoint, profile="own")) as store:
        store._programs = Programs(patience_s=0.3)

        def put() -> None:
            with pytest.raises(StoreAuthError, match=r"program\.sh.*; check the credentials") as caught:
                store.put("a", [b"x"])
            errors.append(caught.value)

        threads = [threading.Thread(target=put) for _ in range(8)]
        started_s = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 8
    assert len(pids.read_text().split()) == 1
    assert time.monotonic() - started_s < 8 * 0.3
