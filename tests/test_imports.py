"""Imports point down: what is pure torch stays usable without Lightning."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["quantization", "losses", "networks"])
def test_no_lightning(module: str):
    code = f"import sys, kdq_lightning.{module}; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
