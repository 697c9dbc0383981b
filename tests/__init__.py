"""The tests, in the folders of `python/crossfl`; what they share is in `support`."""

import pytest

pytest.register_assert_rewrite("tests.support")
