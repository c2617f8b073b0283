"""What a run starts from beside its shards: the weights of a finished run, and external rows that these encoded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ask_dist.bank import external
from ask_dist.bank.messages import State
from ask_dist.config import Config
from ask_dist.data.leaks import HeldOut, words
from ask_dist.data.shards import ShardList, stable_id
from ask_dist.errors import InputError
from ask_dist.evaluate.encode import encode, paired_rows
from ask_dist.evaluate.external import banked_clips, load_corpus
from ask_dist.models import saved
from ask_dist.models.audio import audio_settings_read
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.encoder import CHOICES
from ask_dist.models.text import Vocabulary, text_settings_read

if TYPE_CHECKING:
    from ask_dist.train.state import TrainState

# What the weights do not depend on. The tokenizer, which comes with them, is as large as it is; where the encoders came
# from does not matter any more.
MAY_DIFFER = {
    "source": True,
    "dropout": True,
    "logit_scale_init": True,
    "logit_scale_max": True,
    "logit_bias_init": True,
    "audio": {"source", "freeze", "unfreeze_at", "lora"},
    "text": {"source", "freeze", "unfreeze_at", "lora", "vocabulary"},
}
NAMED = 3  # captions that a refusal quotes
ANCHORS = 8192  # clips encoded before the first step; as many as a generation of the refiner learns from
log = logging.getLogger(__name__)


def check_start(config: Config, shards: dict[str, ShardList]) -> None:
    """Refuses settings, weights, banks and a corpus that the run can't start from.

    Raises:
        InputError: an encoder would leave one of its settings unread; logit_scale would begin above its cap;
            `refine.corpus` is not there; `model.from` is no other finished run, or one of another architecture;
            `bank.from` is no bank, or not one of these weights, does not fit, or holds what this run is tested on.
    """
    _refuse_settings(config)
    if config.refine.corpus is not None:
        load_corpus(config.refine.corpus, config)
    if config.model.source is None:
        return
    if config.model.source.resolve() == config.run_dir.resolve():
        raise InputError(f"model.from={config.model.source} is this very run; choose another name=")
    other = saved.load_config(config.model.source)
    asked, unread = _shape(config), _unread(other)
    for key, value in _shape(other).items():
        if asked[key] != value and key not in unread:
            source = config.model.source
            raise InputError(f"{key} is {asked[key]}, but model.from={source} was trained with {value}: set that")
    if config.bank.source is not None:
        state = external.load(config.bank.source, saved.digest(config.model.source), config.model.embedding_dim)
        rows, anchors = len(state["ids"]), min(ANCHORS, shards["train"].clips)
        if rows + anchors > config.bank.capacity:
            raise InputError(
                f"bank.from={config.bank.source} holds {rows} rows, and {anchors} clips are encoded before the first "
                f"step; bank.capacity is {config.bank.capacity}, raise it to {rows + anchors} at least"
            )
        _refuse_held_out(config.bank.source, state, HeldOut.of(shards))
        if config.data.fingerprints and state["audio"].any() and _compared(other) != _compared(config):
            log.warning(
                "bank.from=%s holds no sounds to compare by data.fingerprints, only keys, digests and recordings; "
                "`ask-dist bank build` compares sounds, where the run of --checkpoint has data.fingerprints=true and "
                "the same validation, test and held_out",
                config.bank.source,
            )


def new_model(config: Config, vocabulary: Vocabulary) -> DualEncoder:
    """The model of a run before its first step, without the weights of `model.from`.

    Folders and files that the pretrained encoders of that run came from are not needed again.

    Raises:
        InputError: an encoder can't be had, or `augment` asks for what it has not.
    """
    model = config.model if config.model.source is None else saved.described(config.model, config.model.source)
    built = build_dual_encoder(model, config.data.sample_rate, vocabulary)
    built.audio.augment(config.augment)
    return built


def held_out_clips(config: Config, shards: dict[str, ShardList], rank: int = 0, world_size: int = 1) -> HeldOut:
    """What the run must not learn from, as rank 0 could read it. A collective.

    A disk of one rank may fail where others read: if each went by what it read itself, they would refuse other clips,
    and keep vectors of frozen towers under other digests.
    """
    found: list[Any] = [None]
    if rank == 0:
        data = config.data
        found = [HeldOut.of(shards, fingerprints=data.fingerprints, max_clip_seconds=data.max_clip_seconds)]
    if world_size > 1:
        dist.broadcast_object_list(found)
    return found[0]


def name_unread(state: TrainState) -> None:
    """Warns, on rank 0, of clips that can't be read and so not be held out, and puts them into the quarantine."""
    if state.log is not None:
        state.loader.bad.note(0, [], state.held_out.unread)
        for line in state.held_out.warnings:
            state.log.warn(line)


def encode_anchors(state: TrainState) -> None:
    """Puts rows of training clips by the starting weights into the bank, and lets the refiner note them. A collective.

    External rows are right at step 0. Only rows that are known then and later tell how they have drifted since.
    """
    model, shards = state.engine.whole(), state.shards["train"]
    part = encode(model, shards, state.config, state.rank, state.world_size, limit=ANCHORS, held_out=state.held_out)
    if state.knowledge is not None:
        state.knowledge.put(*paired_rows(part), global_step=0)
    dist.barrier()
    if state.rank == 0 and state.knowledge is not None:
        state.knowledge.begin()
    dist.barrier()


def _refuse_held_out(folder: Path, state: State, held_out: HeldOut) -> None:
    """Raises InputError for a bank with clips, by key, sound or recording, or captions alone, of the splits that are
    tested on.

    The folder was checked against the splits of the run that built it. Those of this run may be others.
    """
    banked = banked_clips(folder)
    unnamed = len(set(state["ids"][~state["audio"].any(axis=1)].tolist()) - banked.keys())
    if unnamed and held_out.keys:
        raise InputError(
            f"bank.from={folder} holds {unnamed} captions whose words are not in its clips.jsonl, to be compared with "
            "those of data.validation, data.test and data.held_out; build it again"
        )
    ids, sounds = set(state["ids"].tolist()), {sound.hex() for sound in held_out.sounds}
    rows = [clip for row, clip in banked.items() if row in ids]
    clips = ids & {stable_id(key) for key in held_out.keys}
    clips |= {clip.id for clip in rows if clip.sound in sounds or clip.recording in held_out.recordings}
    captions = [clip.captions[0] for clip in rows if clip.is_caption and words(clip.captions[0]) in held_out.captions]
    if clips:
        raise InputError(
            f"bank.from={folder} holds {len(clips)} clips of data.validation, data.test or data.held_out; build it "
            "again without them, or test on others"
        )
    if captions:
        quoted = ", ".join(map(repr, captions[:NAMED]))
        raise InputError(
            f"bank.from={folder} holds {len(captions)} captions without audio that data.validation, data.test or "
            f"data.held_out has ({quoted}); build it again without them, or test on others"
        )


def _compared(config: Config) -> tuple[object, ...]:
    """What a run compares with fingerprints, and whether it does."""
    data = config.anchored().data
    return data.fingerprints, data.validation, data.test, data.held_out


def _shape(config: Config) -> dict[str, object]:
    """The settings that the weights depend on, by their names in a configuration."""
    flat: dict[str, object] = {"data.sample_rate": config.data.sample_rate}
    for name, value in config.model.model_dump(mode="json", exclude=MAY_DIFFER).items():  # type: ignore[arg-type]
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"model.{name}.{key}".rstrip("."): setting for key, setting in inner.items()}
    return flat


def _refuse_settings(config: Config) -> None:
    """Raises InputError for settings that finished runs may have, and that no further run should begin with."""
    for key, value in _unread(config).items():
        side = key.split(".")[1]
        name = getattr(config.model, side).name
        raise InputError(
            f"{key}={value} is not read by the encoder {name}; leave it out, or set model.{side}.name to one that "
            "reads it (docs/encoders.md)"
        )
    first, most = config.model.logit_scale_init, config.model.logit_scale_max
    if first is not None and first > most:
        raise InputError(
            f"model.logit_scale_init={first:g} is above model.logit_scale_max={most:g}; lower the one or raise the "
            "other"
        )


def _unread(config: Config) -> dict[str, object]:
    """The settings of a run's encoders that are given, and that these don't read."""
    found: dict[str, object] = {}
    towers = (("audio", config.model.audio, audio_settings_read), ("text", config.model.text, text_settings_read))
    for side, tower, read in towers:
        for key in sorted(set(CHOICES) - set(read(tower.name))):
            given = key in type(tower).model_fields and getattr(tower, key) != type(tower).model_fields[key].default
            if given:
                found[f"model.{side}.{key}"] = getattr(tower, key)
    return found
