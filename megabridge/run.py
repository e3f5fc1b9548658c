"""`python -m megabridge.run [group=choice ...] [key=value ...]`: composes the config once, checks it, starts ranks.

torch is never imported here. Under torchrun or srun this process takes its place as a rank instead: it composes the
same config, rank 0 makes the run directory, and it starts this rank and stays beside it.

Exit status: 0 done; 1 a rank failed; 2 the config can't work; 75 stopped by a signal, after a save; 128 + n a rank was
ended by signal n; 130 a second Ctrl-C, or one before the first step; 143 the same of SIGTERM.
"""

from __future__ import annotations

import sys

from megabridge.errors import MegabridgeError
from megabridge.launchers.processes import standard_streams


def main() -> None:
    """The console script. Exits with the status that the module's docstring lists."""
    sys.exit(_status())


def _status() -> int:
    try:
        standard_streams.settle(quiet=True)
        from megabridge.launchers import run  # here, so that a Ctrl-C during the imports is one like any other

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
