# A small model that answers as Humpty Dumpty does, from conversations that this repository composes.
#
#   python train.py config/humpty_chat.py
#   python sample.py --out_dir=out/humpty_chat
#
# It has 1.33 million parameters and takes 6 to 14 minutes on 2 CPU cores. docs/chat.md says what it can do.

out_dir = "out/humpty_chat"
dataset = "humpty_chat"  # 85,000 conversations

# the model, in Llama's architecture, so that it can be exported
n_layer = 4
n_head = 4
n_embd = 128
n_hidden = 352  # a multiple of 32, so that each matrix can be stored in 8 bits
block_size = 256
position = "rotary"
norm = "rmsnorm"
mlp = "gated"
activation = "silu"
init = "zero"
tie_weights = False

# the training
batch_size = 8
max_iters = 2900
optimizer = "normuon"
learning_rate = 0.016  # high, because most subwords are rare
muon_learning_rate = 0.025
muon_momentum = 0.85
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.1
grad_clip = 0.0
eval_interval = 1450
