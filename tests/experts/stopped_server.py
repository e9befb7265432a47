"""An expert server in a process of its own, for tests that stop and continue it. Prints its port.

Usage: python -m tests.experts.stopped_server STORE INCARNATION
"""

from __future__ import annotations

import sys
from pathlib import Path

from experts.server import ExpertServer
from experts.store import ExpertStore
from tests.experts.fleet import LIMITS, info_of, make_worker
from tests.experts.wire_peers import SECRET


def main() -> None:
    store = ExpertStore.open(Path(sys.argv[1]))
    worker = make_worker(store)
    server = ExpertServer(
        worker.compute, info_of(worker), secret=SECRET, incarnation=int(sys.argv[2]), limits=LIMITS
    )
    server.start()
    print(server.port, flush=True)
    sys.stdin.read()  # until the test closes it, or ends


if __name__ == "__main__":
    main()
