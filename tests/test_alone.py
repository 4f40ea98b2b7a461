"""model.py by itself, as somebody copies it into an empty folder."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALONE = """
import sys
import torch
from model import GPT, ModelConfig

torch.manual_seed(0)
model = GPT(ModelConfig(vocab_size=65, n_layer=2, n_embd=32, block_size=16))
idx = torch.arange(17)[None] % 5
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(60):
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.1 < losses[0], losses
text = model.eval().generate(idx[:, :3], 30, top_k=1)[0].tolist()
assert text == [i % 5 for i in range(33)], text
try:
    GPT(ModelConfig(vocab_size=65, n_embd=33))
except ValueError as error:
    assert "n_embd=33 must be a multiple of n_head=2" in str(error)
ours = [name for name in sys.modules if name.startswith("humptygpt")]
print(ours)
"""


def test_copied_into_an_empty_folder_model_py_trains_and_generates(folder):
    shutil.copy(ROOT / "model.py", folder)
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
