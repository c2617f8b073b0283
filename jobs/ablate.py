"""`ask-dist ablate` as a cluster job.

ray job submit --working-dir . -- python jobs/ablate.py configs/ablation.yaml

Paths of shards and runs must be absolute and shared by all nodes: git-ignored folders are not uploaded.
"""

import sys

from ask_dist.cli import main

if __name__ == "__main__":
    main(["ablate", *sys.argv[1:]])
