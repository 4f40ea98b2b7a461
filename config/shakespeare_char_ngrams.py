# A GPT of the demo's width and depth with n-gram embeddings: besides each character, frequent n-grams of 2 to 6
# characters have trained embeddings.
#
#   python train.py config/shakespeare_char_ngrams.py
#
# 16.9 million parameters, nearly all of them n-gram embeddings. On 2 CPU cores it takes about three minutes and reaches
# a validation loss of 1.45 to 1.46 nats per character. RECORDS.md has what was tried.

out_dir = "out/shakespeare_char_ngrams"
dataset = "shakespeare_char"  # tiny Shakespeare: 1.1 million characters

# the model
n_layer = 4
n_head = 2
n_embd = 128
block_size = 256  # context of 256 characters
position = "rotary"
norm = "rmsnorm"
activation = "relu_squared"
qk_norm = True
init = "zero"  # each block starts as the identity
tie_weights = False
ngrams = 6  # the statistics of short n-grams are most of what can be learned in so few steps
ngram_min_count = 4  # an n-gram that occurs 4 times has an embedding
ngram_dropout = 0.45  # without it, the embeddings memorise the text
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
eval_iters = 55  # all of tiny Shakespeare's validation split
