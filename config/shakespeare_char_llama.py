# Llama's architecture on tiny Shakespeare, character by character, for export to transformers, llama.cpp and Ollama.
#
#   python train.py config/shakespeare_char_llama.py
#   python export.py --out_dir=out/shakespeare_char_llama --to=exported
#   python export.py --out_dir=out/shakespeare_char_llama --to=model.gguf
#
# The model has 0.82 million parameters and is trained with the settings of shakespeare_char.py, whose model has 0.81
# million. On 2 CPU cores, it takes three to four minutes and reaches a validation loss of 1.4949 nats per character.

out_dir = "out/shakespeare_char_llama"
dataset = "shakespeare_char"

# the model
n_layer = 4
n_head = 2
n_embd = 128
n_hidden = 352  # a multiple of 32, so that each matrix can be stored in 8 bits
block_size = 256  # context of 256 characters
position = "rotary"
norm = "rmsnorm"
mlp = "gated"
activation = "silu"
init = "zero"
tie_weights = False

# the training, the same as in shakespeare_char.py
batch_size = 4
max_iters = 2400
optimizer = "normuon"
learning_rate = 6e-3
muon_learning_rate = 0.03
muon_momentum = 0.85
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.1
grad_clip = 0.0
eval_interval = 600
