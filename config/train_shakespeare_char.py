# nanoGPT's character model for one GPU, under the same file name as there: 10.7 million parameters, dropout, AdamW.
#
#   python train.py config/train_shakespeare_char.py
#
# It takes minutes on a GPU and most of a day on 2 CPU cores; both are estimates, not measurements. nanoGPT reports a
# validation loss of 1.4697 on random crops. nanoGPT's version for a laptop is this file followed by
#   --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4
#   --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2  # a model of this size overfits such a small text

batch_size = 64
max_iters = 5000
lr_decay_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
