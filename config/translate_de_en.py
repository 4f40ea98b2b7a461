# German to English, by an encoder that reads the one and a decoder that writes the other.
#
#   python train.py config/translate_de_en.py
#   python sample.py --out_dir=out/translate_de_en --start="Wo wohnst du?"
#
# The shape is that of 2017, the parts are later ones, and Muon trains them; config/translate_de_en_2017.py has the
# paper's own. On Multi30k and 2 CPU cores it takes about 27 minutes.

out_dir = "out/translate_de_en"
dataset = "translate_de_en"

model = "transformer"
n_layer = 3  # in the encoder, and again in the decoder
n_head = 4
n_embd = 192
n_hidden = 576
block_size = 80  # tokens: the longest source, and the longest target
position = "rotary"
norm = "rmsnorm"
activation = "relu_squared"
qk_norm = True
init = "zero"

dropout = 0.1
label_smoothing = 0.1
batch_size = 24  # as many pairs of similar lengths as fit into 24 times block_size
max_iters = 2500
optimizer = "muon"
learning_rate = 6e-3
muon_learning_rate = 0.03
beta2 = 0.98
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.0
eval_interval = 500
