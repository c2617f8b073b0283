"""The schema of an ablation and the trials that it means."""

from __future__ import annotations

from pathlib import Path

import pytest

from ask_dist.ablation.space import load, smoke_of
from ask_dist.errors import InputError

ROOT = Path(__file__).parents[2]
SMALL = """
name: small
seeds: [0, 1]
corpora:
  scenes: {shards: shards/smoke, scenes: 100}
arms:
  plain: {loss: info_nce}
  ask: {}
  corpus: {knowledge_corpus: true}
experiments:
  - {corpus: scenes, baseline: plain, arms: [ask], swapped: [0.0, 0.3]}
  - {corpus: scenes, baseline: ask, arms: [plain]}
"""


def written(folder: Path, text: str = SMALL) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def test_every_arm_is_run_once_a_seed_and_share_and_seed_by_seed(tmp_path):
    keys = [trial.key for trial in load(written(tmp_path)).trials()]
    assert len(keys) == len(set(keys)) == 8
    assert [key.rsplit("-", 1)[1] for key in keys] == ["0"] * 4 + ["1"] * 4
    assert keys[:4] == ["scenes-00-plain-0", "scenes-00-ask-0", "scenes-30-plain-0", "scenes-30-ask-0"]


def test_an_experiment_may_have_seeds_of_its_own(tmp_path):
    text = SMALL.replace("swapped: [0.0, 0.3]", "swapped: [0.3], seeds: [1, 2]")
    keys = [trial.key for trial in load(written(tmp_path, text)).trials()]
    noisy = ["scenes-30-plain-1", "scenes-30-ask-1"]
    clean = ["scenes-00-ask-0", "scenes-00-plain-0", "scenes-00-ask-1", "scenes-00-plain-1"]
    assert sorted(keys) == sorted([*clean, *noisy, "scenes-30-plain-2", "scenes-30-ask-2"])


def test_the_shipped_ablation_is_valid_and_its_smoke_keeps_every_arm_of_the_corpora_that_are_there(tmp_path):
    shipped = load(ROOT / "configs" / "ablation.yaml")
    corpora = {name: {"shards": str(tmp_path)} for name in shipped.corpora if name != "recordings"}
    (tmp_path / "train").mkdir()
    overrides = [f"corpora.{name}.shards={corpus['shards']}" for name, corpus in corpora.items()]
    smoke = smoke_of(load(ROOT / "configs" / "ablation.yaml", [*overrides, f"corpora.recordings.shards={tmp_path}/no"]))
    assert set(smoke.corpora) == set(corpora)
    assert smoke.seeds == (0,)
    assert smoke.folder != shipped.folder
    wanted = {arm for e in shipped.experiments if e.corpus in corpora for arm in e.all_arms}
    assert {trial.arm_name for trial in smoke.trials()} == wanted
    assert {trial.seed for trial in smoke.trials()} == {0}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: plain", "baseline: plane", "unknown arm 'plane'"),
        ("{corpus: scenes, baseline: ask", "{corpus: scene, baseline: ask", "unknown corpus 'scene'"),
        ("arms: [ask]", "arms: [corpus]", "needs corpora.scenes.knowledge_scenes above 0"),
        ("loss: info_nce", "loss: infonce", "arms.plain.loss"),
        ("seeds: [0, 1]", "seeds: []", "seeds"),
        ("loss: info_nce", "lose: info_nce", "unknown key arms.plain.lose; did you mean arms.plain.loss?"),
        ("corpus: scenes, ", "", "experiments.0.corpus is missing; set it in the file"),
        ("baseline: plain", "base_line: plain", "did you mean experiments.0.baseline?"),
    ],
)
def test_what_can_not_be_run_is_refused_in_one_line(tmp_path, old, new, message):
    with pytest.raises(InputError) as refused:
        load(written(tmp_path, SMALL.replace(old, new)))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no configuration file"):
        load(tmp_path / "none.yaml")
