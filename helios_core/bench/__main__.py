"""`python -m helios_core.bench`"""

import sys

from helios_core.bench.command import main
from helios_core.errors import HeliosError

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except HeliosError as error:
        sys.stderr.write(f"helios bench: {error}\n")
        sys.exit(2)
