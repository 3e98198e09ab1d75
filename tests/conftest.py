"""For all tests."""

from __future__ import annotations

import os

# Triton reads it when it is imported, which torch may do at any time: kernels are tested without a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
