# German to English on everyday sentences: config/translate_de_en.py with a larger model and a convolution.
#
#   python train.py config/everyday_de_en.py
#   python sample.py --out_dir=out/everyday_de_en --start="Wo wohnst du?"
#
# The model has 8.9 million parameters, 4.2 million of them embeddings. On 2 CPU cores with bfloat16 instructions, it
# takes about 28 minutes (estimated from the time per step) and reaches BLEU 53.9 on Tatoeba's test split and 44.1 on
# Multi30k's, with 4 beams. RECORDS.md says what else was tried.

out_dir = "out/everyday_de_en"
dataset = "everyday_de_en"

model = "transformer"
n_layer = 3  # layers of the encoder, and the same number in the decoder
n_head = 4
n_embd = 256
n_hidden = 768
block_size = 80  # longest source or target, in tokens
position = "rotary"
norm = "rmsnorm"
activation = "relu_squared"
mlp_conv = 3  # each feed-forward network also sees the three previous tokens
qk_norm = True
init = "zero"

dropout = 0.0  # this text is read only four times, and weight decay keeps the model from memorising it
label_smoothing = 0.1
batch_size = 24  # a batch has pairs of similar length and up to 24 * block_size tokens
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
eval_interval = 1250
