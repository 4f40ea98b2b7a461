# Blocks read their input as it is. The article: "Layer Normalization".
#
# Twelve blocks again, with residual connections. Does it matter that each normalises its input?
#
#   python train.py config/article/05_norm/1-without.py
#

out_dir = "out/article/05_norm/1-without"
dataset = "shakespeare_char"

n_layer = 12
n_head = 4
n_embd = 64
block = "pre_norm"
norm = "none"  # the identity
mlp = "plain"
activation = "gelu"
position = "rotary"
bias = True

# training
batch_size = 8
block_size = 128
max_iters = 500
optimizer = "normuon"
learning_rate = 0.006
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
eval_interval = 100
