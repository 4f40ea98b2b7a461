# The recipe for a text of your own, and what train.py takes where no config file is named: the demo's.
#
#   python train.py --dataset=mine
#   python train.py --dataset=mine --minutes=10     chooses the size and the length by the text and the time
#
# RECORDS.md has what was tried.

# the model
n_layer = 4
n_head = 2
n_embd = 128
block_size = 256  # context of 256 tokens
position = "rotary"
norm = "layernorm"
activation = "relu_squared"
mlp_conv = 3  # each feed-forward network sees the three tokens before its own, too
qk_norm = True
init = "zero"  # each block starts as the identity
tie_weights = False

# the training
batch_size = 4  # small: many steps matter more than exact ones
max_iters = 2400
optimizer = "normuon"
learning_rate = 6e-3
muon_learning_rate = 0.03
muon_momentum = 0.85
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.1  # against overfitting over several epochs
grad_clip = 0.0
eval_interval = 600
