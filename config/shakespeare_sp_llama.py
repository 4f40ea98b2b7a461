# Llama's architecture on subwords, for your own text and for export to transformers, llama.cpp and Ollama.
#
#   python train.py config/shakespeare_sp_llama.py
#   python export.py --out_dir=out/shakespeare_sp_llama --to=model.gguf
#
# For your own text, run python prepare_data.py --input=FILE_OR_FOLDER --name=mine --tokenizer=bpe, and add
# --dataset=mine --out_dir=out/mine to the first command.
#
# The model has 1.00 million parameters. Training takes a few minutes on 2 CPU cores (the exact time was not measured)
# and reaches a validation loss of 3.2096 nats per token, 2.091 bits per byte.

out_dir = "out/shakespeare_sp_llama"
dataset = "shakespeare_sp"  # 1,024 subwords of tiny Shakespeare, learned by sentencepiece

# the model
n_layer = 4
n_head = 4
n_kv_head = 2  # each pair of query heads shares keys and values
n_embd = 128
n_hidden = 352  # a multiple of 32, so that each matrix can be stored in 8 bits
block_size = 256  # context of 256 tokens, about 600 characters
position = "rotary"
norm = "rmsnorm"
mlp = "gated"
activation = "silu"
init = "zero"
tie_weights = False

# the training, the same as in shakespeare_char_llama.py but for fewer steps
batch_size = 4
max_iters = 1600
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
eval_interval = 400
