# The demo's recipe at the size of the smallest GPT-2: a convolution in each feed-forward network, NorMuon, rotary
# positions. It trains 162 million parameters, 39 million of them in the head, on 0.66 billion tokens of FineWeb.
#
#   python prepare_data.py fineweb                    downloads one file, 2 GB, which is read about once
#   python train.py config/fineweb_normuon.py
#   torchrun --standalone --nproc_per_node=8 train.py config/fineweb_normuon.py     on 8 GPUs
#
# It needs a GPU with 24 GB or more, and has not been run yet: its time and its loss are unmeasured. Computed at 40 % of
# an H100's peak, it takes 24 minutes. Its learning rates are guesses between the demo's and those that are usual for
# Muon at this size.

out_dir = "out/fineweb_normuon"
dataset = "fineweb"

# the model
n_layer = 12
n_head = 6
n_embd = 768
block_size = 1024
position = "rotary"
norm = "layernorm"
activation = "relu_squared"
mlp_conv = 3  # each feed-forward network also sees the three previous tokens
qk_norm = True
init = "zero"  # each block starts as the identity
tie_weights = False
vocab_size = 50304  # GPT-2's 50,257 tokens, padded to a multiple of 128, for faster matrix products on a GPU

# the training
batch_size = 16
gradient_accumulation_steps = 16  # 262,144 tokens per step
max_iters = 2500
optimizer = "normuon"
learning_rate = 3e-3
muon_learning_rate = 0.02
muon_momentum = 0.95  # smoother than the demo's, for fewer and larger steps
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.1
grad_clip = 0.0
eval_interval = 250
eval_iters = 100
