# Sub-words: the network reads 8 pieces of words, which sentencepiece learnt from the text, instead of 8 characters.
# It looks back further, and guesses more at once.
# The article: "Subword Tokenizers".
#
#   python train.py config/article/03_subwords.py
#
# On 2 CPU cores it takes 15 s and ends at a validation loss of 2.85 bits per character.

out_dir = "out/article/03_subwords"
dataset = "shakespeare_sp"  # new: 1,024 pieces of 2.4 characters on average
model = "window_mlp"
n_embd = 32
window = 8
n_layer = 1
n_hidden = 256
activation = "relu"
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
