# Layer normalization: before each block, the features of a token are normalised to mean 0 and variance 1.
# The article: "Layer Normalization".
#
#   python train.py config/article/06_layer_norm.py
#
# On 2 CPU cores it takes 22 s and reaches a validation loss of 2.89 bits per character.

out_dir = "out/article/06_layer_norm"
dataset = "shakespeare_sp"
n_layer = 4
n_head = 1
n_embd = 128
mlp = "none"
position = "none"
block = "pre_norm"
norm = "layernorm"  # new
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
