"""`python -m megabridge.run [group=choice ...] [key=value ...]`: composes the config once, checks it, starts ranks.

torch is never imported here. Under torchrun or srun this process is a rank's supervisor instead: it composes the same
config, on rank 0 makes the run directory, and starts the rank as its child.

Exit status: 0 done; 1 a rank failed; 2 the config can't work; 75 stopped by a signal, after a save; 128 + n a rank was
ended by signal n; 130 a second Ctrl-C, or one before the first step; 143 the same of SIGTERM.
"""

from __future__ import annotations

import sys

from megabridge.errors import MegabridgeError
from megabridge.launchers.processes import standard_streams


def main() -> None:
    """Entry point of the console script. Exits with a status from the module's docstring."""
    sys.exit(_status())


def _status() -> int:
    try:
        standard_streams.settle(quiet=True)
        from megabridge.launchers import run  # here, so that Ctrl-C during the imports is handled like any other

        status = run.main()
        if status == 0:
            standard_streams.check()
    except KeyboardInterrupt:
        return 130
    except MegabridgeError as error:
        print(f"megabridge: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    main()
