# German to English with a small version of the original Transformer: post-norm, sinusoidal positions, ReLU, bias terms,
# one embedding matrix for both languages and the head, embeddings scaled by sqrt(n_embd), label smoothing, dropout.
# Source: Vaswani et al. 2017, arXiv:1706.03762, sections 3 and 5.
#
#   python train.py config/translate_de_en_2017.py
#
# It reaches BLEU 40.6 on the test split in about 22 minutes on one CPU core with bfloat16 instructions. The paper uses
# Adam, which learns far less in so few steps (see RECORDS.md).

out_dir = "out/translate_de_en_2017"
dataset = "translate_de_en"

model = "transformer"
n_layer = 3
n_head = 4
n_embd = 192
n_hidden = 576
block_size = 80
position = "sinusoidal"
norm = "layernorm"
block = "post_norm"
activation = "relu"
bias = True
init = "zero"

dropout = 0.1
label_smoothing = 0.1
batch_size = 24
max_iters = 2500
optimizer = "muon"
learning_rate = 4e-3
muon_learning_rate = 0.01  # with 0.03, post-norm learns little
muon_momentum = 0.95
beta2 = 0.98
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.0
eval_interval = 500
