"""A cluster for use by hand: `python -m tests.cluster` prints the path of its kubeconfig and runs until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys

from tests.cluster.cluster import Cluster


def main() -> int:
    """Exit code 0; 3 when there can be no cluster here."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__, allow_abbrev=False)
    parser.add_argument("--port", type=int, default=0, help="of the API server on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--release", default="1.32", help="the version of Kubernetes, 1.27 for one")
    options = parser.parse_args()
    try:
        cluster = Cluster(options.release, port=options.port)
    except (OSError, RuntimeError) as error:
        print(f"no cluster: {error}", file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with cluster:
        print(cluster.kubeconfig, flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
