"""`ask-dist evaluate` as a cluster job: ray job submit --working-dir . -- python jobs/evaluate.py runs/quickstart"""

import sys

from ask_dist.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
