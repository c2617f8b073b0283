"""`ask-dist evaluate` as a cluster job.

ray job submit --working-dir . -- python jobs/evaluate.py /shared/runs/quickstart

Paths of shards and runs must be absolute and shared by all nodes: git-ignored folders are not uploaded.
"""

import sys

from ask_dist.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
