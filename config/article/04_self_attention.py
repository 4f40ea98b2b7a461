# Self-attention, one head: instead of a fixed window, each piece looks at all pieces before it and weighs them by how
# well they answer it. Four such blocks, one after another, and nothing else: no residuals, norms, positions.
# The article: "Self Attention".
#
#   python train.py config/article/04_self_attention.py
#
# On 2 CPU cores it takes 19 s and ends at a validation loss of 3.68 bits per character.

out_dir = "out/article/04_self_attention"
dataset = "shakespeare_sp"
n_layer = 4  # new: model = "gpt", four blocks of attention alone
n_head = 1
n_embd = 128
mlp = "none"
position = "none"
block = "plain"
norm = "none"
bias = True

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
