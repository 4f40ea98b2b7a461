# German to English with a decoder-only model, the article's alternative: a GPT reads the German and continues with the
# English, in one sequence. There is no encoder and no cross-attention, and the loss is on the English tokens only. The
# model has as many parameters as config/translate_de_en.py, and each step has as many pairs.
#
#   python train.py config/translate_de_en_gpt.py
#   python sample.py --out_dir=out/translate_de_en_gpt --start="Ein Mann schläft auf einer Bank im Park."
#
# After 500 steps it reaches BLEU 32.1 (translate_de_en.py: 31.5) and takes 1.6 times as long. The full run has not been
# measured.

out_dir = "out/translate_de_en_gpt"
dataset = "translate_de_en"

model = "gpt"
n_layer = 7
n_head = 4
n_embd = 192
n_hidden = 604
block_size = 128  # longest pair in tokens, source and target together
position = "rotary"
norm = "rmsnorm"
activation = "relu_squared"
qk_norm = True
init = "zero"

dropout = 0.1
label_smoothing = 0.1
batch_size = 26  # 26 * block_size tokens per batch: as many pairs as in translate_de_en.py
max_iters = 2500
optimizer = "muon"
learning_rate = 6e-3
muon_learning_rate = 0.03
muon_momentum = 0.95
beta2 = 0.98
schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.0
eval_interval = 500
