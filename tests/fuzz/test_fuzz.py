"""A thousand damaged files at each change; the full count is run by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time are set as on Linux")
def test_a_thousand_damaged_files_end_in_an_error_or_in_the_very_adapter():
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--trials", "1000", "--seed", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1,000 trials" in result.stdout
