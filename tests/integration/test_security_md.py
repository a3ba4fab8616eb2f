"""SECURITY.md names every request that is sent, and its policies are of these rights."""

import json
import re
from pathlib import Path

import pytest
import torch

from asyncckpt import KeepLast, Run, S3Options, Saver, restore
from asyncckpt.store.s3 import S3Store
from tests.training import numbered

TEXT = (Path(__file__).parent.parent.parent / "SECURITY.md").read_text()
UPLOAD = {"CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"}
READING = {"s3:GetObject", "s3:ListBucket"}


def rights() -> dict[str, str]:
    """The table: request to right."""
    found = {}
    for line in TEXT.splitlines():
        row = re.fullmatch(r"\| (.+) \| `(s3:\w+)` \| .+ \|", line)
        if row:
            found |= dict.fromkeys(row[1].split(", "), row[2])
    return found


def policies() -> list[dict]:
    return [json.loads(text) for text in re.findall(r"```json\n(.+?)```", TEXT, re.DOTALL)]


@pytest.fixture
def sent(monkeypatch):
    """The names of all requests, as S3 calls them."""
    seen: set[str] = set()
    ask = S3Store._ask

    def noted(self, operation, key, **params):
        seen.add("".join(word.capitalize() for word in operation.split("_")))
        return ask(self, operation, key, **params)

    monkeypatch.setattr(S3Store, "_ask", noted)
    return seen


def right_of(request: str) -> str:
    return "s3:PutObject" if request in UPLOAD else rights()[request]


def test_every_request_of_a_runs_life_stands_in_the_table_of_rights(sent, s3_bucket, moto_endpoint):
    url, options = f"s3://{s3_bucket}/run", S3Options(endpoint_url=moto_endpoint)
    with Saver(url, store=options, engine="inline", codec="none", keep=[KeepLast(2)]) as saver:
        for step in (1, 2, 3):
            saver.save(step, numbered(step))
        saver.save(4, {"two parts": torch.zeros(2**23)})
        saver.wait()
    with Run(url, store=options) as run:
        run.rewind(3)
        run.collect_garbage()
    assert sent >= {"PutObject", "UploadPart", "GetObject", "ListObjectsV2", "DeleteObject"}
    assert {right_of(request) for request in sent} == set(rights().values()) - {
        "s3:AbortMultipartUpload",
        "s3:ListMultipartUploadParts",
    }


def test_a_reader_needs_the_rights_that_are_said(sent, s3_bucket, moto_endpoint):
    url, options = f"s3://{s3_bucket}/run", S3Options(endpoint_url=moto_endpoint)
    with Saver(url, store=options, engine="inline") as saver:
        saver.save(1, numbered(1))
    sent.clear()
    restore(url, numbered(0), store=options)
    assert {right_of(request) for request in sent} <= READING


def test_the_policy_of_a_writer_that_cannot_delete_has_every_other_right():
    actions = {action for statement in policies()[0]["Statement"] for action in statement["Action"]}
    assert actions == set(rights().values()) - {"s3:DeleteObject"}


def test_the_lifecycle_rule_ends_uploads_and_deletes_no_object():
    (rule,) = policies()[1]["Rules"]
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] > 1
    assert "Expiration" not in rule
