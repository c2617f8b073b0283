"""The knowledge bank: embeddings of every pair that the run has met, searched exactly and kept in step."""
