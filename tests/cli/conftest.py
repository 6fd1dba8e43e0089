import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(compile_quickly: None) -> None:
    """For every module here."""
