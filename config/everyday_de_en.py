# Everyday German to English: an encoder-decoder on captions of photographs, on the everyday part of a dictionary, its
# sentences, phrases and words, and on sentences made of these words by the rules of a grammar book.
#
#   python train.py config/everyday_de_en.py
#   python sample.py --out_dir=out/everyday_de_en --start="Wo wohnst du?"
#
# On 2 CPU cores with bfloat16 instructions it takes 26 to 31 minutes. It reaches BLEU 39.8 on Multi30k's test split and
# gets about 24 of the fifty everyday sentences in tests/ right; RECORDS.md has all of them.

out_dir = "out/everyday_de_en"
dataset = "everyday_de_en"

model = "transformer"
n_layer = 3  # of the encoder, and as many of the decoder
n_head = 4
n_embd = 192
n_hidden = 576
block_size = 80  # tokens of the longest source, and of the longest target
position = "rotary"
norm = "rmsnorm"
activation = "relu_squared"
mlp_conv = 3  # each feed-forward network sees the three tokens before its own, too
qk_norm = True
init = "zero"
ngrams = 3  # a rare word of two or three subwords is known by its own embedding
ngram_min_count = 4
ngram_dropout = 0.3  # against memorising them over four epochs

dropout = 0.1
label_smoothing = 0.1
batch_size = 12  # as many pairs of similar length as fit into 12 times block_size tokens
max_iters = 7500
optimizer = "normuon"
learning_rate = 6e-3
muon_learning_rate = 0.03
muon_momentum = 0.9
ngram_learning_rate = 0.05
beta2 = 0.98
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.0
eval_interval = 2500
