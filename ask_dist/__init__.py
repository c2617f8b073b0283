"""ask_dist: audio-text retrieval training on Ray with a shared, self-refining knowledge bank."""

__version__ = "0.1.0"
