"""Encoders and the space that they share."""
