# A larger model of tiny Shakespeare, with n-gram embeddings.
#
#   python train.py config/shakespeare_char_large.py
#
# 36.9 million parameters. On 2 CPU cores it takes about 18 minutes and reaches a validation loss near 1.41 nats per
# character. RECORDS.md has what was tried.

out_dir = "out/shakespeare_char_large"
dataset = "shakespeare_char"

n_layer = 6
n_head = 4
n_embd = 256
block_size = 512  # the longer the block, the fewer tokens have little context
position = "rotary"
norm = "rmsnorm"
activation = "relu_squared"
qk_norm = True
init = "zero"
tie_weights = False
ngrams = 6
ngram_min_count = 4
ngram_dropout = 0.5  # this prevents overfitting
dropout = 0.03  # more of it raises the validation loss

batch_size = 8
max_iters = 1100
optimizer = "muon"
learning_rate = 6e-3
muon_learning_rate = 0.03
ngram_learning_rate = 0.03  # low, since training takes several epochs
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.05
grad_clip = 0.0
eval_interval = 275
eval_iters = 28  # all of the validation split
