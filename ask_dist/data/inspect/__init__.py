"""Looking into shards: are they whole, what is in them, what does a clip say."""
