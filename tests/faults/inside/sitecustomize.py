"""Imported by a service's interpreter at its start, because the harness puts this folder on its PYTHONPATH."""

import os
import sys
from pathlib import Path

if "ASYNCCKPT_TEST_FAULTS" in os.environ:
    sys.path.insert(0, str(Path(__file__).parents[3]))
    from tests.faults.files import install_from_environment

    install_from_environment()
