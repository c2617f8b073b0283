"""The captions of a split, without its audio."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator

from ask_dist.data.shards import ShardList


def captions(shards: ShardList, limit: int) -> Iterator[str]:
    """Captions in shard order, at most about `limit`, taken evenly from the shards; unreadable ones are passed over.

    Seeks from header to header: for a local split this reads a few percent of its bytes.
    """
    share = max(1, limit // max(1, len(shards.paths)))
    for path in shards.paths:
        count = 0
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    if count >= share:
                        break
                    if not member.name.endswith(".json") or not member.isfile():
                        continue
                    content = tar.extractfile(member)
                    for caption in json.load(content).get("captions", []) if content else []:
                        count += 1
                        yield str(caption)
        except (OSError, tarfile.TarError, ValueError, AttributeError):
            continue  # the loader names what is broken
