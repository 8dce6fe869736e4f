"""A Ray cluster of three nodes on this machine, one core each; hears on standard input what is to befall it.

`remove PID` ends the node on which a process works, unless that is the head, without warning; `head` ends the
cluster's head service. The end of the input ends all. Run as a script, since Ray stays in its process.
"""

import json
import sys
from typing import Any

import psutil
from ray.cluster_utils import Cluster


def begin(attempts: int = 3) -> tuple[Cluster, list[Any]]:
    """The cluster and its machines beside the head; a busy one may need more than the 30 s that Ray gives."""
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=1, include_dashboard=False)
        return cluster, [cluster.add_node(num_cpus=1) for _ in range(2)]
    except Exception:
        cluster.shutdown()
        if attempts == 1:
            raise
        return begin(attempts - 1)


def main() -> None:
    cluster, nodes = begin()
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        done = False
        if command == "head":
            cluster.head_node.kill_gcs_server()
            done = True
        else:
            above = {one.pid for one in psutil.Process(int(argument)).parents()}
            for node in nodes:
                if node.all_processes["raylet"][0].process.pid in above:
                    cluster.remove_node(node, allow_graceful=False)
                    nodes.remove(node)
                    done = True
                    break
        print(json.dumps({"done": done}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
