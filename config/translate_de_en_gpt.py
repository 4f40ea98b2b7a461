# The article's other way to translate: a GPT reads the German and goes on with the English, in one stream. There is no
# encoder and no cross-attention; the loss is counted on the English only. As many parameters as
# config/translate_de_en.py, and as many pairs in each step.
#
#   python train.py config/translate_de_en_gpt.py
#   python sample.py --out_dir=out/translate_de_en_gpt --start="Wo wohnst du?"

out_dir = "out/translate_de_en_gpt"
dataset = "translate_de_en"

model = "gpt"
n_layer = 7
n_head = 4
n_embd = 192
n_hidden = 604
block_size = 128  # tokens: the longest pair, source and target together
position = "rotary"
norm = "rmsnorm"
activation = "relu_squared"
qk_norm = True
init = "zero"

dropout = 0.1
label_smoothing = 0.1
batch_size = 26  # with block_size the room for as many pairs as there
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
