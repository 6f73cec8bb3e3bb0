"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# A busy machine makes one example slow, and that is no fault of the code; pytest's own timeout bounds a test.
settings.register_profile("helexa", deadline=None)
settings.load_profile("helexa")
