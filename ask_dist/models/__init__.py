"""Encoders and the space that they share."""

# Imported for their registrations: whoever imports an encoder's registry finds all names in it.
from ask_dist.models import clap, cnn14, minilm, spectrogram_transformers, yamnet

__all__ = ["clap", "cnn14", "minilm", "spectrogram_transformers", "yamnet"]
