"""One arm with one seed: training, evaluation and probes in one process, the same for all arms but for the loss."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ask_dist.ablation.inputs import SPLITS, Inputs, build_model, load_inputs, text_inputs
from ask_dist.ablation.knowledge import TrialKnowledge
from ask_dist.ablation.probes import ATTRIBUTES, probes
from ask_dist.ablation.space import Trial
from ask_dist.config import SIGMOID, BatchLoss, Optimization
from ask_dist.data.captions import swap_captions
from ask_dist.evaluate.drift import auroc
from ask_dist.evaluate.long_tail import GROUPS, query_groups
from ask_dist.evaluate.retrieval import ranks
from ask_dist.losses.cross_batch import CrossBatchMemory
from ask_dist.losses.global_contrast import GlobalContrast
from ask_dist.losses.grad_cache import GradCache
from ask_dist.losses.objective import AskObjective
from ask_dist.models.dual_encoder import DualEncoder, Features
from ask_dist.processor import use_cpu
from ask_dist.train.engine import learning_rate
from ask_dist.train.parameters import parameter_groups

ENCODE_BATCH = 128
GRAD_CACHE_CHUNK = 32


@dataclass
class Outcome:
    """What a trial found.

    Attributes:
        metrics: single numbers: R@1 on validation, AUROC of the reliability, drift, seconds, steps.
        values: by metric, float [queries] in percent: what the paired comparison is made of. NaN: not asked of it.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)


def run_trial(trial: Trial, cache: Path) -> Outcome:
    """Trains and evaluates one arm.

    Args:
        trial: the settings.
        cache: where inputs are kept between trials.

    Raises:
        InputError: the corpus is missing or smaller than asked.
    """
    use_cpu(1)
    corpus = trial.corpus
    train, validation, test = (load_inputs(corpus, split, cache) for split in SPLITS)
    scenes = corpus.scenes or len(train) - corpus.knowledge_scenes
    run = _Run(trial, train.part(0, scenes), train.part(scenes, scenes + corpus.knowledge_scenes))
    run.train()
    outcome = run.measured()
    outcome.metrics["validation_text_to_audio_R@1"] = float(_hits(run.model, validation)["text_to_audio_R@1"].mean())
    hits = _hits(run.model, test, corpus.gallery)
    outcome.values |= hits | _by_frequency(hits["text_to_audio_R@1"], test, train.part(0, scenes))
    outcome.values |= _probe_hits(run.model, test)
    return outcome


class _Run:
    """The training of one trial."""

    def __init__(self, trial: Trial, train: Inputs, further: Inputs) -> None:
        self.trial, self.arm, self.corpus = trial, trial.arm, trial.corpus
        loss: BatchLoss = "siglip" if self.arm.loss == "siglip" else "info_nce"
        if loss == "siglip":
            model = self.corpus.model.model_copy(update=SIGMOID)
            self.corpus = self.corpus.model_copy(update={"model": model})
        captions, self.swapped = swap_captions(train.captions, trial.swapped, seed=0)
        place = {caption: at for at, caption in enumerate(train.captions)}
        torch.manual_seed(trial.seed)
        self.model = build_model(self.corpus, train)
        # A swapped pair has another's caption, and with it that caption's features.
        own_text = text_inputs(self.model, train)[[place[caption] for caption in captions]]
        rest_text = text_inputs(self.model, further) if len(further) else own_text[:0]
        width = max(own_text.shape[1], rest_text.shape[1])
        self.audio = torch.cat([train.audio, further.audio])
        self.text = torch.cat([nn.functional.pad(text, (0, width - text.shape[1])) for text in (own_text, rest_text)])
        self.pairs = len(train)
        steps_per_epoch = self.pairs // self.arm.batch_size
        self.steps_per_epoch = steps_per_epoch
        self.steps = max(1, round(self.corpus.epochs * self.arm.samples_share * steps_per_epoch))
        self.objective = AskObjective(self.arm.knowledge, self.arm.knowledge.half_life * steps_per_epoch, loss)
        self.memory = CrossBatchMemory(self.corpus.model.embedding_dim, self.arm.memory)
        self.denominators = GlobalContrast(self.pairs, self.arm.momentum)
        self.schedule = Optimization(learning_rate=self.corpus.learning_rate * self.arm.learning_rate_factor)
        groups = parameter_groups(self.model, self.corpus.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
        further_rows = len(further) if self.arm.knowledge_corpus else 0
        self.knowledge = TrialKnowledge(trial, self.pairs, further_rows, self.encode)
        self.reliability = torch.full((self.pairs,), -1.0)
        self.seconds = 0.0

    def train(self) -> None:
        """All steps."""
        started = time.perf_counter()
        self.model.train()
        between = max(1, round(self.steps_per_epoch / self.trial.generations_per_epoch))
        opened = False
        for step, ids in enumerate(self.batches()):
            if self.arm.loss == "ask" and step >= self.arm.knowledge.start * self.steps:
                if not opened:
                    self.knowledge.open(step)
                    self.knowledge.refine(step)
                    opened = True
                elif step % between == 0:
                    self.knowledge.refine(step)
            self.step(step, ids)
        if opened:
            self.knowledge.refine(self.steps)
        self.seconds = time.perf_counter() - started

    def batches(self) -> Iterator[Tensor]:
        """Ids of each step: epochs are permuted by the seed, alike in all arms, and cut into full batches."""
        for step in range(self.steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0 or step == 0:
                order = torch.from_numpy(np.random.default_rng([self.trial.seed, epoch]).permutation(self.pairs))
            yield order[place * self.arm.batch_size : (place + 1) * self.arm.batch_size]

    def step(self, step: int, ids: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.schedule, step, self.steps)
        self.optimizer.zero_grad()
        inputs = (self.audio[ids].float(), self._texts(ids))
        if self.arm.loss == "grad_cache":
            chunks = GradCache(self.model, inputs, GRAD_CACHE_CHUNK, seed=self._seed(step))
            self.objective(*chunks.features, ids).loss.backward()
            chunks.backward(lambda loss, last: loss.backward())
        else:
            torch.manual_seed(self._seed(step))
            self.loss(step, ids, self.model(*inputs)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.gradient_clip)
        self.optimizer.step()
        with torch.no_grad():
            for parameter, most in self.model.largest().items():
                parameter.clamp_(max=most)

    def loss(self, step: int, ids: Tensor, features: Features) -> Tensor:
        """The arm's loss, and what it remembers of the step."""
        progress = step / self.steps
        audio, text, scale, _ = features
        if self.arm.loss == "xbm":
            # From the first step on, rows that drift as fast as they do then collapse it: the method's gate.
            early = progress < self.arm.knowledge.start
            plain = self.objective(*features, ids).loss
            value = plain if early else self.memory.loss(ids, audio, text, scale).mean()
            self.memory.push(ids, audio, text)
            return value
        if self.arm.loss == "global_contrast":
            return self.denominators.loss(ids, audio, text, scale).mean()
        if self.arm.loss in ("info_nce", "siglip"):
            return self.objective(*features, ids).loss
        neighbours = self.knowledge.neighbours(ids) if progress >= self.arm.knowledge.asked_from else None
        output = self.objective(*features, ids, neighbours=neighbours, progress=progress)
        known = output.reliability >= 0
        self.reliability[ids[known]] = output.reliability[known]
        self.knowledge.upsert(ids, audio, text, output.reliability, step)
        return output.loss

    def encode(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Unit rows of scenes by id, without dropout."""
        ids = torch.arange(first, last)
        return _encoded(self.model, self.audio[ids], self._texts(ids))

    def measured(self) -> Outcome:
        """What can be told of the training itself."""
        metrics = {"steps": float(self.steps), "seconds": self.seconds}
        if self.arm.loss == "ask":
            metrics |= self.knowledge.measures()
            known = (self.reliability >= 0).numpy()
            if self.swapped.any() and known.any():
                metrics["auroc"] = 100.0 * auroc(self.reliability.numpy()[known], ~self.swapped[known])
        return Outcome(metrics)

    def _texts(self, ids: Tensor) -> Tensor:
        return _trimmed(self.text[ids])

    def _seed(self, step: int) -> int:
        """Of a step's dropout; the chunks of a large batch count on from it."""
        return ((self.trial.seed << 24) + step) << 8


def _trimmed(text: Tensor) -> Tensor:
    """Tokens without columns that are padding in every row; features as they are."""
    return text if text.is_floating_point() else text[:, : max(1, int((text > 0).sum(dim=1).max()))]


@torch.no_grad()
def _encoded(model: DualEncoder, audio: Tensor, text: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows float32 of both, in evaluation mode."""
    was_training = model.training
    model.eval()
    sounds = [model.encode_audio(part.float()) for part in audio.split(ENCODE_BATCH)]
    sentences = [model.encode_text(_trimmed(part)) for part in text.split(ENCODE_BATCH)]
    model.train(was_training)
    return torch.cat(sounds).numpy(), torch.cat(sentences).numpy()


def _hits(model: DualEncoder, inputs: Inputs, gallery: int | None = None) -> dict[str, np.ndarray]:
    """R@1 of every query, both directions, each among `gallery` clips."""
    audio, text = map(torch.from_numpy, _encoded(model, inputs.audio, text_inputs(model, inputs)))
    size = gallery or len(inputs)
    found = [ranks(*part, torch.arange(len(part[0]))) for part in zip(audio.split(size), text.split(size), strict=True)]
    return {f"{name}_R@1": np.concatenate([part[name].hits(1) for part in found]) for name in found[0]}


def _by_frequency(hits: np.ndarray, test: Inputs, train: Inputs) -> dict[str, np.ndarray]:
    """The text-to-audio hits of head, mid and tail queries; NaN for those of other groups."""
    counts = Counter(name for classes in train.classes for name in classes)
    group = np.array(query_groups(test.classes, counts))
    return {f"{name}_text_to_audio_R@1": np.where(group == name, hits, np.nan) for name in GROUPS}


def _probe_hits(model: DualEncoder, test: Inputs, seed: int = 0) -> dict[str, np.ndarray]:
    """For each attribute and clip, whether the right caption is nearer than the changed one; NaN: no such probe."""
    asked = probes(test.descriptions, seed)
    if not asked:
        return {}
    audio, right = _encoded(model, test.audio, text_inputs(model, test))
    captions = text_inputs(model, test, [probe.caption for probe in asked])
    _, wrong = _encoded(model, test.audio[:1], captions)
    found = {f"probe_{attribute}": np.full(len(test), np.nan) for attribute in ATTRIBUTES}
    for probe, other in zip(asked, wrong, strict=True):
        nearer = audio[probe.clip] @ right[probe.clip] > audio[probe.clip] @ other
        found[f"probe_{probe.attribute}"][probe.clip] = 100.0 * nearer
    return found
