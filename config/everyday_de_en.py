# German to English on everyday sentences: the parts of config/translate_de_en.py in a larger model, and a convolution.
#
#   python train.py config/everyday_de_en.py
#   python sample.py --out_dir=out/everyday_de_en --start="Wo wohnst du?"
#
# 8.9 million parameters, of which 4.2 are embeddings. On 2 CPU cores with bfloat16 instructions it takes about 28
# minutes, computed from its step, and reaches BLEU 53.9 on Tatoeba's test split and 44.1 on Multi30k's, with 4 beams.
# RECORDS.md has what was tried.

out_dir = "out/everyday_de_en"
dataset = "everyday_de_en"

model = "transformer"
n_layer = 3  # of the encoder, and as many of the decoder
n_head = 4
n_embd = 256
n_hidden = 768
block_size = 80  # tokens of the longest source, and of the longest target
position = "rotary"
norm = "rmsnorm"
activation = "relu_squared"
mlp_conv = 3  # each feed-forward network sees the three tokens before its own, too
qk_norm = True
init = "zero"
tie_weights = True  # the output head is the embedding

dropout = 0.0  # this text is read four times only, and weight decay keeps it from being learned by heart
label_smoothing = 0.1
batch_size = 24  # as many pairs of similar length as fit into 24 times block_size tokens
max_iters = 5000
optimizer = "muon"
learning_rate = 6e-3
muon_learning_rate = 0.03
muon_momentum = 0.95
beta2 = 0.98
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.025
grad_clip = 1.0
eval_interval = 1250
