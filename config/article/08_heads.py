# Multi-head attention: four heads of dimension 32 attend to four things at once, instead of one head of dimension 128.
# The article: "Multi-head Attention".
#
#   python train.py config/article/08_heads.py
#
# On 2 CPU cores it takes 30 s and reaches a validation loss of 2.91 bits per character.

out_dir = "out/article/08_heads"
dataset = "shakespeare_sp"
n_layer = 4
n_head = 4  # new
n_embd = 128
mlp = "none"
position = "none"
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
