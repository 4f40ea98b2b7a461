# Subwords: the network reads the last 8 subwords, learned from the text by sentencepiece, instead of 8 characters. Its
# context is longer, and it predicts more at once.
# The article: "Subword Tokenizers".
#
#   python train.py config/article/03_subwords.py
#
# On 2 CPU cores it takes 15 s and reaches a validation loss of 2.85 bits per character.

out_dir = "out/article/03_subwords"
dataset = "shakespeare_sp"  # new: 1,024 subwords of 2.4 characters on average
model = "window_mlp"
n_embd = 32
window = 8
n_layer = 1
n_hidden = 256
activation = "relu"
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
