# A small GPT that writes like Shakespeare, one character at a time. This is the demo, and the place to start.
#
#   python train.py config/shakespeare_char.py
#
# The model has 0.81 million parameters. On 2 CPU cores with bfloat16 instructions, training takes 1.5 to 5 minutes and
# reaches a validation loss of 1.4515 nats per character. RECORDS.md says what else was tried.
#
# The defaults are a plain GPT-2 without biases, trained with AdamW. Each departure from them says what it brings: the
# loss after 600 steps of this recipe with the default in its place -> with the recipe, as means over two or three
# seeds. For positions, the convolution and the optimizer, each side has its own best rates; for the others both have
# these. A difference below 0.005 may be chance.

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"  # tiny Shakespeare: 1.1 million characters

# the model
n_layer = 4
n_head = 2
n_embd = 128
block_size = 256  # context of 256 characters
position = "rotary"  # positions rotate queries and keys: 1.6259 -> 1.5730
activation = "relu_squared"  # 1.5798 -> 1.5753
mlp_conv = 3  # an MLP also sees the three characters before: 1.6565 -> 1.5730
qk_norm = True  # bounds the scores; no difference in a short run: 1.5761 -> 1.5753
init = "zero"  # each branch starts at 0; no gain in a short run: 1.5738 -> 1.5753
tie_weights = False  # 1.5810 -> 1.5753

# the training
batch_size = 4  # small, because many steps matter more than precise gradients
max_iters = 2400
optimizer = "normuon"  # with AdamW at its best rate, 16e-3: 1.6848 -> 1.5730
learning_rate = 6e-3  # of the embedding, the head and the convolution
muon_learning_rate = 0.03
muon_momentum = 0.85
beta2 = 0.95  # 1.5727 -> 1.5753
schedule = "linear"  # to 0, instead of a cosine to a tenth: 1.5813 -> 1.5753
min_lr = 0.0
warmup_iters = 10  # 1.5785 -> 1.5753
weight_decay = 0.1  # limits overfitting over 2.4 epochs
grad_clip = 0.0  # 1.5728 -> 1.5753
eval_interval = 600
