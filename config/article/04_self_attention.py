# Self-attention, one head: instead of a fixed window, each token reads all tokens before it, weighted by how well their
# keys match its query. Four such blocks in sequence, and nothing else: no residual connections, norms or positions.
# The article: "Self Attention".
#
#   python train.py config/article/04_self_attention.py
#
# On 2 CPU cores it takes 19 s and reaches a validation loss of 3.68 bits per character.

out_dir = "out/article/04_self_attention"
dataset = "shakespeare_sp"
n_layer = 4  # new: model = "gpt", four blocks of attention only
n_head = 1
n_embd = 128
mlp = "none"
position = "none"
block = "plain"
norm = "none"
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
