"""A real S3 server, once for the session."""

from collections.abc import Iterator

import pytest

from tests.storage.s3 import NoAttributes, Swift, run_swift


@pytest.fixture(scope="session")
def swift() -> Iterator[Swift]:
    try:
        with run_swift() as swift:
            yield swift
    except NoAttributes as error:
        pytest.skip(error.__doc__ or "")
