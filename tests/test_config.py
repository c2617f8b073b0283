"""The schema: what it accepts, and that every refusal names the value, the limit and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ask_dist import config as configuration
from ask_dist.ablation import space as ablation
from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.tune import space

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def parse(*overrides: str) -> Config:
    tree: dict[str, Any] = {"name": "run", "data": {"train": "shards/train"}}
    for override in overrides:
        configuration.apply_override(tree, override)
    return configuration.parse(tree)


def refusal(*overrides: str) -> str:
    with pytest.raises(InputError) as error:
        parse(*overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_there_are_shipped_configurations():
    assert "quickstart.yaml" in [path.name for path in SHIPPED]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # a sweep names its base relative to the working folder
    tree = yaml.safe_load(path.read_text())
    if "search" in tree:
        assert space.load(path).search
    elif "arms" in tree:
        assert ablation.load(path).arms
    else:
        config = configuration.load(path)
        assert config.name == path.stem


def test_the_defaults_are_a_whole_run():
    config = parse()
    assert (config.cluster.num_workers, config.data.lanes, config.global_batch_size) == (2, 8, 64)
    assert config.knowledge.enabled
    assert config.knowledge.reliability.enabled


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("optimization.learning_rat=1", "did you mean optimization.learning_rate?"),
        ("optimisation.epochs=1", "did you mean optimization?"),
        ("knowledge.reliability.gama=1", "did you mean knowledge.reliability.gamma?"),
        ("data.trian=x", "did you mean data.train?"),
        ("model.audio.lora.rnk=4", "did you mean model.audio.lora.rank?"),
        ("bank.zzzz=1", "known here: capacity, dtype"),
    ],
)
def test_an_unknown_key_names_the_nearest(override, near):
    message = refusal(override)
    assert message.startswith(f"unknown key {override.split('=')[0].removesuffix('.epochs')}; ")
    assert near in message


@pytest.mark.parametrize(
    "override",
    [
        "optimization.learning_rate=0",
        "optimization.learning_rate=-1",
        "optimization.learning_rate=.nan",
        "optimization.epochs=.inf",
        "optimization.zero_stage=4",
        "optimization.micro_batch_size=0",
        "optimization.warmup_share=1.1",
        "knowledge.start=-0.1",
        "knowledge.neighbours=1025",
        "knowledge.reliability.rank=1",
        "refine.cpu_share=0",
        "refine.strategy=magic",
        "bank.dtype=float64",
        "bank.prototypes=[0]",
        "seed=-1",
        "seed=2147483648",
        "name=../elsewhere",
        "name=.hidden",
        "name=a/b",
        "model.dropout=true and false",
        "cluster=3",
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(override):
    key, value = override.split("=")
    message = refusal(override)
    assert message.startswith(key)
    assert str(yaml.safe_load(value)).strip("[]") in message


def test_a_missing_key_is_named():
    with pytest.raises(InputError, match=r"data is missing; set it in the file or as data=VALUE"):
        configuration.parse({"name": "run"})


def test_every_problem_is_named_at_once():
    message = refusal("seed=-1", "model.dropout=2", "nonsense=1")
    assert message.count("; ") >= 3
    assert all(key in message for key in ("seed=-1", "model.dropout=2", "unknown key nonsense"))


def test_overrides_are_read_as_yaml():
    config = parse("bank.prototypes=[4, 16]", "data.validation=null", "optimization.learning_rate=1e-4", "name='7'")
    assert config.bank.prototypes == (4, 16)
    assert config.data.validation is None
    assert config.optimization.learning_rate == 1e-4
    assert config.name == "7"


def test_later_overrides_win_and_beat_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: run\nseed: 1\ndata: {train: x}\n")
    assert configuration.load(path).seed == 1
    assert configuration.load(path, ["seed=2", "seed=3"]).seed == 3


@pytest.mark.parametrize("override", ["seed", "=3", "seed.low=1", "name=[unclosed"])
def test_a_malformed_override_is_quoted(override):
    with pytest.raises(InputError, match=re.escape(repr(override))):
        configuration.apply_override({"seed": 1}, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds NoneType, not a mapping"),
        (b"- 1\n", "holds list, not a mapping"),
        (b"name: [\n", "not readable YAML"),
        (b"\xff\xfe\x00", "not readable YAML"),
        (b"name: !!python/object/apply:os.system ['true']\n", "not readable YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        configuration.load(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_says_where_the_shipped_ones_are(tmp_path):
    with pytest.raises(InputError, match=r"no configuration file .*missing\.yaml; the ones shipped are in configs/"):
        configuration.load(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="not readable"):
        configuration.load(tmp_path)  # a folder


def test_dump_round_trips(tmp_path):
    config = parse("bank.prototypes=[4]", "cluster.use_gpu=false", "optimization.learning_rate=3e-5", "data.test=a b")
    path = tmp_path / "config.yaml"
    path.write_text(configuration.dump(config))
    assert configuration.load(path) == config


def test_anchored_paths_are_absolute_and_nothing_else_changes(tmp_path, monkeypatch):
    config = parse("data.test=shards/test", "output_dir=out", "seed=5")
    monkeypatch.chdir(tmp_path)
    anchored = config.anchored()
    assert anchored.data.train == tmp_path / "shards/train"
    assert anchored.data.test == tmp_path / "shards/test"
    assert anchored.data.validation is None
    assert anchored.run_dir == config.run_dir == tmp_path / "out" / "run"
    monkeypatch.chdir("/")
    assert anchored.run_dir == tmp_path / "out" / "run"
    assert anchored.anchored() == anchored
    paths = {"output_dir", "data"}
    assert anchored.model_dump(exclude=paths) == config.model_dump(exclude=paths)


def test_shards_may_lie_in_several_places_and_behind_urls(tmp_path, monkeypatch):
    config = parse("data.train=[shards/a, 's3://bucket/{0..3}']", "data.weights=[2, 0.5]", "data.test=https://x/y")
    assert config.data.train == (Path("shards/a"), "s3://bucket/{0..3}")
    monkeypatch.chdir(tmp_path)
    anchored = config.anchored()
    assert anchored.data.train == (tmp_path / "shards/a", "s3://bucket/{0..3}")
    assert anchored.data.test == "https://x/y"
    (tmp_path / "config.yaml").write_text(configuration.dump(anchored))
    assert configuration.load(tmp_path / "config.yaml") == anchored
    assert "data.weights has 2 numbers for 1 entries of data.train" in refusal("data.weights=[2, 1]")
    assert refusal("data.train=3").startswith("data.train=3: name a folder or the URL of one")
    assert "name at least one folder" in refusal("data.train=[]")
    assert refusal("data.train=[a]", "data.weights=[0]").startswith("data.weights.0=0: ")


def test_a_configuration_is_read_only():
    with pytest.raises(ValueError, match="frozen"):
        parse().seed = 3


def test_offload_needs_what_zero_divides():
    for offload, stage in (("optimizer", 1), ("all", 3)):
        message = refusal(f"optimization.offload={offload}", f"optimization.zero_stage={stage - 1}")
        assert message.endswith(f"optimization.zero_stage={stage - 1}; set optimization.zero_stage={stage}")
        assert parse(f"optimization.offload={offload}", f"optimization.zero_stage={stage}")


def test_clips_of_their_own_lengths_are_shorter_than_the_longest_and_not_for_zero_3():
    assert parse().data.length_step is None
    assert parse("data.length_step=0.5").data.length_step == 0.5
    assert refusal("data.length_step=0.05").startswith("data.length_step=0.05: ")
    assert "data.clip_seconds=4; set it to less" in refusal("data.length_step=4", "data.clip_seconds=4")
    wide = ("data.length_step=0.5", "optimization.zero_stage=3")
    assert refusal(*wide).endswith("set optimization.zero_stage to 2 or data.length_step to null")
    assert "data.length_step=0.5" in refusal(*wide, "model.audio.freeze=true")
    assert parse(*wide, "model.audio.freeze=true", "data.cache_embeddings=true")


def test_fp16_may_skip_as_many_steps_as_its_loss_scale_takes_to_find():
    assert "set it to 17 or more" in refusal("optimization.precision=fp16", "optimization.max_skipped=16")
    assert parse("optimization.precision=fp16", "optimization.max_skipped=17")
    assert parse("optimization.precision=bf16", "optimization.max_skipped=1", "cluster.use_gpu=false")


def test_uneven_heads_are_refused():
    assert "model.text.heads=3" in refusal("model.text.heads=3")


def test_the_sigmoid_loss_brings_a_bias_and_a_scale_of_its_own_unless_they_are_given(tmp_path):
    assert (parse().optimization.loss, parse().model.logit_bias_init) == ("info_nce", None)
    siglip = parse("optimization.loss=siglip")
    assert (siglip.model.logit_scale_init, siglip.model.logit_bias_init) == (10.0, -10.0)
    given = parse("optimization.loss=siglip", "model.logit_scale_init=5", "model.logit_bias_init=-3").model
    assert (given.logit_scale_init, given.logit_bias_init) == (5.0, -3.0)
    # The resolved file of another run says null.
    (tmp_path / "config.yaml").write_text(configuration.dump(parse()))
    assert configuration.load(tmp_path / "config.yaml", ["optimization.loss=siglip"]).model.logit_bias_init == -10.0
    (tmp_path / "config.yaml").write_text(configuration.dump(siglip))
    assert configuration.load(tmp_path / "config.yaml") == siglip
    assert "set it to null or optimization.loss to siglip" in refusal("model.logit_bias_init=-10")
    assert refusal("optimization.loss=siglip", "model=3").startswith("model=3: ")
    assert "did you mean model.logit_bias_init?" in refusal("optimization.loss=siglip", "model.logit_bias_int=null")


def test_how_a_tower_is_fine_tuned_must_make_sense():
    message = refusal("model.text.unfreeze_at=0.3")
    assert message == "model.text.unfreeze_at=0.3 is of a frozen tower; set model.text.freeze=true"
    assert parse("model.text.unfreeze_at=0.3", "model.text.freeze=true").model.text.unfreeze_at == 0.3
    assert "leave one out" in refusal("model.audio.lora.rank=4", "model.audio.freeze=true")
    assert parse("model.audio.lora.targets=all-linear").model.audio.lora.targets == "all-linear"
    assert parse("model.audio.lora.rank=4").model.audio.lora.targets[:2] == ("query", "value")
    for override in ("layer_decay=0", "layer_decay=1.1", "ema_decay=0", "ema_decay=1"):
        assert refusal(f"optimization.{override}").startswith(f"optimization.{override}: ")


def test_what_augmentation_and_cached_embeddings_cannot_do_is_refused():
    frozen, cached = "model.audio.freeze=true", "data.cache_embeddings=true"
    assert "model.audio.freeze=false" in refusal(frozen, "augment.time_mask=0.2")
    assert "(0.1)" in refusal(frozen, "augment.frequency_mask=0.1")
    assert "model.text.freeze to true" in refusal(cached)
    assert "augment.mix_share=0.5" in refusal(cached, frozen, "augment.mix_share=0.5")
    assert refusal("augment.mix_share=1.5").startswith("augment.mix_share=1.5: ")
    assert "model.audio.unfreeze_at=0.3" in refusal(frozen, cached, "model.audio.unfreeze_at=0.3")
    assert parse(frozen, cached).data.cache_embeddings
    assert parse("model.text.freeze=true", cached, "augment.time_mask=0.2").augment.time_mask == 0.2


def test_fingerprints_need_something_to_be_compared_with():
    assert "data.held_out, which are null" in refusal(
        "data.fingerprints=true", "data.validation=null", "data.test=null"
    )
    for split in ("validation", "test", "held_out"):
        assert parse("data.fingerprints=true", f"data.{split}=shards/x").data.fingerprints


def test_the_global_batch_is_the_one_asked_for_or_one_chunk_a_worker():
    config = parse("optimization.train_batch_size=96", "optimization.micro_batch_size=20")
    assert (config.global_batch_size, config.optimization.local_batch_size(2)) == (96, 48)
    config = parse("optimization.micro_batch_size=20")
    assert (config.global_batch_size, config.optimization.local_batch_size(2)) == (40, 20)


def test_a_deterministic_run_has_no_replicas():
    assert "set bank.replicas=1" in refusal("optimization.deterministic=true", "bank.replicas=2")
    assert parse("optimization.deterministic=true", "bank.shards=3").bank.shards == 3


def test_a_deterministic_run_has_no_inverted_files():
    assert "set bank.index=flat" in refusal("optimization.deterministic=true", "bank.index=ivf_flat")


def test_a_corpus_is_encoded_again_by_one_strategy_alone():
    again = "refine.strategy=reencode"
    assert "or leave the corpus out" in refusal("refine.corpus=shards/further")
    assert "needs a bank" in refusal(again, "knowledge.enabled=false")
    external = ("model.from=runs/first", "bank.from=banks/further")
    assert "set refine.corpus to the shards or captions" in refusal(again, *external)
    config = parse(again, *external, "refine.corpus=shards/further")
    assert config.anchored().refine.corpus == Path("shards/further").absolute()
    assert parse(again).refine.corpus is None


@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from(["micro_batch_size", "train_batch_size"]),
)
def test_the_remedy_for_lanes_and_batches_works(workers, lanes, batch_size, key):
    overrides = {"cluster.num_workers": workers, "data.lanes": lanes, f"optimization.{key}": batch_size}
    for _ in range(3):  # following the advice at most twice gives a valid run
        try:
            config = parse(*(f"{key}={value}" for key, value in overrides.items()))
        except InputError as error:
            lanes_to, size_to = re.search(rf"set (?:it to (\d+)|optimization\.{key}=(\d+))", str(error)).groups()
            overrides |= {"data.lanes": int(lanes_to)} if lanes_to else {f"optimization.{key}": int(size_to)}
        else:
            break
    assert config.data.lanes % config.cluster.num_workers == 0
    assert config.global_batch_size % config.data.lanes == 0
