"""What the tests of training share."""

from collections.abc import Iterator

import pytest

from tests.dsjax.training.small_runs import STARTED


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
        process.communicate()
