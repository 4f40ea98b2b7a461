# An alternative to the previous rung: positions as sinusoids of many wavelengths, which need no training.
# The article: "Appendix, Positional Encoding".
#
#   python train.py config/article/09_positions_sinusoidal.py
#
# On 2 CPU cores it takes 33 s and reaches a validation loss of 2.88 bits per character.

out_dir = "out/article/09_positions_sinusoidal"
dataset = "shakespeare_sp"
n_layer = 4
n_head = 4
n_embd = 128
mlp = "none"
position = "sinusoidal"  # instead of "learned"
block = "pre_norm"
norm = "layernorm"
dropout = 0.1
bias = True

# training: 550 steps of 768 tokens, about a million characters, as on every rung
batch_size = 12
block_size = 64
max_iters = 550
learning_rate = 2e-3
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 50
eval_interval = 110
