"""Retrieval, long-tail and drift metrics, the search index and the run's report. Nothing here imports ray."""
