import os
import secrets

# Ray reads them when it is imported: each that a test starts wants a token, as one must that `helios serve` joins.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
