"""For all tests."""

from __future__ import annotations

import os
import secrets

# Triton reads it when it is imported, which torch may do at any time: kernels are tested without a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Ray reads them when it is imported: each that a test starts wants a token, as one must that `helios serve` joins.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
