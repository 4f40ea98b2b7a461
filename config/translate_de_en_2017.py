# German to English with a small version of the original Transformer: post-norm, sinusoidal positions, ReLU, bias terms,
# one embedding matrix for both languages and the head, embeddings scaled by sqrt(n_embd), label smoothing, dropout,
# AdamW with warmup. Source: Vaswani et al. 2017, arXiv:1706.03762, sections 3 and 5.
#
#   python train.py config/translate_de_en_2017.py
#
# It trains for as many steps as config/translate_de_en.py. It has not been measured here.

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
mlp_conv = 0  # no convolution
qk_norm = False
init = "gpt2"
tie_weights = True  # the output head reuses the embedding

dropout = 0.1
label_smoothing = 0.1
batch_size = 24
max_iters = 2500
optimizer = "adamw"
learning_rate = 2e-3
beta2 = 0.98
schedule = "cosine"  # the paper: 1 / sqrt(step) after 4,000 warmup steps of 25,000 tokens
min_lr = None  # a tenth of learning_rate
warmup_iters = 300
weight_decay = 0.0
grad_clip = 1.0
eval_interval = 500
