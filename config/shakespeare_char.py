# A small GPT that writes like Shakespeare, character by character: the demo, and the place to start from.
#
#   python train.py config/shakespeare_char.py
#
# On 2 CPU cores it takes about two minutes and ends at a validation loss near 1.60 nats per character.

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"  # tiny Shakespeare: 1.1 million characters

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64  # looks back on 64 characters
position = "rotary"  # 0.02 nats better than learned positions here

batch_size = 12
max_iters = 1300
eval_interval = 325
optimizer = "muon"  # as far in 800 steps as AdamW in 2,600
learning_rate = 4e-3  # of AdamW, for embeddings and norms
muon_learning_rate = 0.02  # of Muon, for all matrices
weight_decay = 0.0
schedule = "linear"
warmup_iters = 10
min_lr = 0.0
