# What came of it, in the style of Llama 3.1: rotary positions, RMS norms, gated feed-forward networks (SwiGLU), heads
# that share keys and values, a head of its own for the output, no biases.
# The article: "What makes large language models work so well?".
#
#   python train.py config/article/11_llama.py
#
# On 2 CPU cores it takes 49 s and ends at a validation loss of 2.51 bits per character.

out_dir = "out/article/11_llama"
dataset = "shakespeare_sp"
n_layer = 4
n_head = 4
n_kv_head = 2  # new, as all of the following
n_embd = 128
mlp = "gated"
activation = "silu"
position = "rotary"
rope_base = 10000.0
block = "pre_norm"
norm = "rmsnorm"
dropout = 0.1
bias = False
tie_weights = False

# the training: 550 times 768 pieces, which are as many characters as on every rung
batch_size = 12
block_size = 64
max_iters = 550
learning_rate = 2e-3
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 50
eval_interval = 110
