"""A real script, started from a shell as users do: no main guard, a pipe behind it, a package found only beside it."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import asyncckpt
from asyncckpt import Run
from tests.processes import alive, ended_at_last, eventually
from tests.trainers import s3
from tests.training import assert_numbered

SCRIPT = """\
import sys
import torch
import asyncckpt

sys.path.insert(0, {shadows!r})
print("package", asyncckpt.__file__)
saver = asyncckpt.Saver({url!r}, store=asyncckpt.S3Options(
    endpoint_url={endpoint!r}, retry=asyncckpt.RetryPolicy(deadline_s=60, first_wait_s=0.02, max_wait_s=0.1, first_contact_s=0.5)))
weights = {{f"w{{n}}": torch.full((50_000,), float(10 + n)) for n in range(3)}}
saver.save(1, {{"weights": weights, "step": 1}})
print("service", saver._launcher._engine.pid)
"""

MARK = """
import os as _os
from pathlib import Path as _Path
(_Path(__file__).parent / "served").write_text(str(_os.getpid()))
"""


@pytest.fixture
def folder(tmp_path, proxy, s3_url):
    """A script, a copy of the package beside it, and a folder of modules named like the standard library's."""
    package = Path(asyncckpt.__file__).parent
    shutil.copytree(package, tmp_path / "asyncckpt", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "asyncckpt/engine/service.py").open("a") as service:
        service.write(MARK)
    shadows = tmp_path / "shadows"
    shadows.mkdir()
    for name in ("queue", "json", "selectors", "socket", "numpy"):
        (shadows / f"{name}.py").write_text("raise RuntimeError('this shadows the real module')\n")
    script = SCRIPT.format(shadows=str(shadows), url=s3_url, endpoint=proxy.url)
    (tmp_path / "train.py").write_text(script)
    return tmp_path


def test_a_piped_script_ends_at_once_and_its_own_copy_of_the_package_finishes_the_save(folder, proxy, s3_url):
    proxy.down = True
    command = f"{shlex.quote(sys.executable)} train.py 2>&1 | tee log"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    log = (folder / "log").read_text()
    assert done.stdout == log
    said = dict(line.split(maxsplit=1) for line in log.splitlines() if line.startswith(("package", "service")))
    assert said["package"] == str(folder / "asyncckpt/__init__.py"), log
    assert log.count("package") == 1, "the script ran once: nothing imports it again"
    service = int(said["service"])
    with ended_at_last(service):
        assert alive(service), "the store is still down, and tee has ended nevertheless"
        eventually((folder / "asyncckpt/engine/served").exists, "the service imported the copy")
        proxy.down = False
        store = s3(proxy.url)
        with Run(s3_url, store=store) as run:
            eventually(run.latest, "the save is committed")
        assert_numbered(asyncckpt.load(s3_url, store=store), 1)
        assert int((folder / "asyncckpt/engine/served").read_text()) == service
        eventually(lambda: not alive(service), "the service is gone")
