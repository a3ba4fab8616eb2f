"""Programs of others that some tests run. Without one its tests are skipped; `make test` installs it where it may."""

import shutil

import pytest

ZSTD = shutil.which("zstd")
needs_zstd = pytest.mark.skipif(ZSTD is None, reason="needs the command zstd: apt-get install zstd")
