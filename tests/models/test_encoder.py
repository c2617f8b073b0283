"""An encoder of somebody else's: the one that the documentation shows, installed beside this package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"
PROGRAM = """
import sys, torch
from pathlib import Path
from ask_dist import config as configuration
from ask_dist.models.dual_encoder import build_dual_encoder
from ask_dist.models.saved import load_model, save_model
from ask_dist.models.text import Vocabulary

assert "my_sounds" not in sys.modules
model = {"embedding_dim": 8, "audio": {"name": "bands", "options": {"bands": 20}}}
config = configuration.parse({"name": "run", "data": {"train": "x", "sample_rate": 8000}, "model": model})
torch.manual_seed(0)
built = build_dual_encoder(config.model, 8000, Vocabulary.train(["a dog barks", "rain"], 300)).train()
audio, tokens = torch.tensor([[0.01], [0.3]]) * torch.randn(2, 8000), built.text.tokenize(["a dog barks", "rain"])
optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
losses = []
for _ in range(20):
    features = built(audio, tokens)
    loss = torch.nn.functional.cross_entropy(10 * features.audio_features @ features.text_features.T, torch.arange(2))
    optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses
run = Path(sys.argv[1])
save_model(run / "model", built)
(run / "config.yaml").write_text(configuration.dump(config))
_, loaded = load_model(run)
assert torch.equal(loaded.encode_audio(audio), built.eval().encode_audio(audio))
model["audio"]["options"] = {"pitch": 1}
build_dual_encoder(configuration.parse({"name": "run", "data": {"train": "x"}, "model": model}).model, 8000, None)
"""


@pytest.fixture
def installed(tmp_path) -> Path:
    """What `pip install` leaves of the page's package."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) < 40
    (project,) = re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    (group, entry) = re.findall(r'entry-points\.("[a-z_.]+")\]\n(.*)\n', project)[0]
    site = tmp_path / "site"
    (site / "my_sounds-1.0.dist-info").mkdir(parents=True)
    (site / "my_sounds.py").write_text(code)
    (site / "my_sounds-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: my-sounds\nVersion: 1.0\n")
    entry = entry.replace('"', "")
    (site / "my_sounds-1.0.dist-info" / "entry_points.txt").write_text(f"[{group[1:-1]}]\n{entry}\n")
    return site


def test_the_pages_encoder_trains_is_saved_and_comes_back(installed, tmp_path):
    root = str(PAGE.parents[1])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")],
        env={"PYTHONPATH": f"{installed}:{root}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1].endswith("bands has the options bands and width"), done.stderr


def test_without_the_package_its_runs_are_refused_by_name(tmp_path):
    from ask_dist.config import AudioModel, Model
    from ask_dist.errors import InputError
    from ask_dist.models.audio import build_audio_encoder

    with pytest.raises(InputError, match=r"model\.audio\.name='bands' is not registered; known: ast, clap-htsat"):
        build_audio_encoder(Model(audio=AudioModel(name="bands")), 8000)
