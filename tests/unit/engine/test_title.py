"""What `ps` shows of a process of ours."""

import subprocess
import sys

import pytest

from asyncckpt.engine.title import run_name, service_title

_PROGRAM = """
import subprocess, os, sys
from asyncckpt.engine.title import Title
title = Title()
for text in ("asyncckpt: run-42, 12 saves in flight", "asyncckpt: run-42, idle", "y" * 9999):
    title.show(text)
    print(subprocess.run(["ps", "-ww", "-o", "comm=", "-o", "args=", "-p", str(os.getpid())], capture_output=True, text=True).stdout.rstrip())
print(os.environ["AFTER_THE_ARGUMENTS"], sys.argv[1])
"""


def shown(argument):
    environment = {"AFTER_THE_ARGUMENTS": "whole", "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM, argument], capture_output=True, text=True, env=environment, check=True
    )
    return ended.stdout.splitlines()


def test_a_process_has_the_name_that_it_took_last_and_its_environment_stays():
    argument = "x" * 200
    *lines, rest = shown(argument)
    comm, args = zip(*(line.split(maxsplit=1) for line in lines), strict=True)
    assert set(comm) == {"asyncckpt"}
    assert args[:2] == ("asyncckpt: run-42, 12 saves in flight", "asyncckpt: run-42, idle")
    assert set(args[2]) == {"y"}
    assert len(args[2]) < 9999
    assert rest == f"whole {argument}"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/team/run-42", "run-42"),
        ("s3://bucket", "bucket"),
        ("/scratch/run 7", "run 7"),
        ("file:///a%0Ab", "ab"),
        ("s3://bucket/" + "x" * 200, "x" * 60),
    ],
)
def test_a_run_is_called_by_the_last_part_of_its_url(url, name):
    assert run_name(url) == name


@pytest.mark.parametrize(
    ("in_flight", "idle", "alone", "says"),
    [
        (0, True, False, "idle"),
        (1, False, False, "1 save in flight"),
        (2, False, False, "2 saves in flight"),
        (0, False, False, "cleaning up"),
        (1, False, True, "1 save in flight, left alone"),
        (0, False, True, "cleaning up, left alone"),
    ],
)
def test_a_service_says_what_it_does(in_flight, idle, alone, says):
    assert service_title("run-42", in_flight=in_flight, idle=idle, alone=alone) == f"asyncckpt: run-42, {says}"
