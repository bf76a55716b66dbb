"""No network: datasets would tell the hub of every file, and ask it for what is not there."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        # what it waits for after each stream of Parquet, https://github.com/apache/arrow/issues/45214
        patch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield
