"""What tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny_runs as tiny


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Encoded clips of two classes, to be read only."""
    return tiny.write_clips(tmp_path_factory.mktemp("clips"))
