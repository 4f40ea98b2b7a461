# Llama's architecture: rotary positions, RMSNorm, gated feed-forward networks (SwiGLU), grouped-query attention, no
# bias terms, a separate output head. Article chapter: "What makes large language models work so well?".
#
# This compares GPT-2's blocks with those of Llama 3.1, which is five years newer. Most of the gap in loss comes from
# the positional encoding: see 08_positions.
#
#   python train.py config/article/11_llama/2-llama.py
#
# On 2 CPU cores it takes 28 s and reaches 2.486 bits per byte (2.452 to 2.516 across three seeds).

out_dir = "out/article/11_llama/2-llama"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_kv_head = 2  # each pair of query heads shares keys and values
n_embd = 128
norm = "rmsnorm"
mlp = "gated"
activation = "silu"
position = "rotary"
bias = False
tie_weights = False

# training
batch_size = 8
block_size = 128
max_iters = 500
optimizer = "normuon"
learning_rate = 0.006
muon_learning_rate = 0.02
muon_momentum = 0.95
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
dtype = "float32"  # auto can differ from machine to machine
eval_interval = 250
