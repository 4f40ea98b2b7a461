# A small GPT that writes like Shakespeare, character by character: the demo, and the place to start from.
#
#   python train.py config/shakespeare_char.py
#
# On 2 CPU cores it takes about three minutes and ends at a validation loss near 1.45 nats per character.
# What was tried, and what it bought, is in RECORDS.md.

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"  # tiny Shakespeare: 1.1 million characters

# the model
n_layer = 4
n_head = 2
n_embd = 128
block_size = 256  # looks back on 256 characters
position = "rotary"
norm = "rmsnorm"
activation = "relu_squared"
qk_norm = True
init = "zero"  # each block starts by changing nothing
tie_weights = False
ngrams = 6  # what 2 to 6 characters are followed by is most of what can be learnt so fast
ngram_min_count = 4
ngram_dropout = 0.45  # or it would be learnt by heart
ngram_learning_rate = 0.05

# the training
batch_size = 8
max_iters = 1500
optimizer = "muon"
learning_rate = 6e-3
muon_learning_rate = 0.03
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.0
grad_clip = 0.0
eval_interval = 500
eval_iters = 55  # all of tiny Shakespeare's validation split, and as much of a larger text
