"""From audio files and captions to batches: decoding, shards, the resumable loader, corpus recipes."""

import os

# WebDataset then refuses to unpickle members and to run shell commands named in URLs. It reads this once, on import.
os.environ["WDS_SECURE"] = "1"
