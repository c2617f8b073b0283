"""The schema of a run: one YAML file, validated as a whole before anything starts.

Imports neither ray nor torch, so that `ask-dist --help` and a configuration error are quick.
"""

from ask_dist.config.files import apply_override, dump, load, parse, read, validated
from ask_dist.config.run import Config
from ask_dist.config.sections import (
    SIGMOID,
    AudioModel,
    Augment,
    Bank,
    BatchLoss,
    Cluster,
    Count,
    Data,
    Knowledge,
    Lora,
    Model,
    Optimization,
    Positive,
    Refine,
    Reliability,
    Section,
    Share,
    TextModel,
    Tracking,
)

__all__ = [
    "SIGMOID",
    "AudioModel",
    "Augment",
    "Bank",
    "BatchLoss",
    "Cluster",
    "Config",
    "Count",
    "Data",
    "Knowledge",
    "Lora",
    "Model",
    "Optimization",
    "Positive",
    "Refine",
    "Reliability",
    "Section",
    "Share",
    "TextModel",
    "Tracking",
    "apply_override",
    "dump",
    "load",
    "parse",
    "read",
    "validated",
]
