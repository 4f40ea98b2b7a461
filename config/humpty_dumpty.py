# One nursery rhyme, memorised: the smallest thing that a language model can do.
#
#   python train.py config/humpty_dumpty.py
#   python sample.py --out_dir=out/humpty_dumpty --start="Humpty Dumpt" --temperature=0 --max_new_tokens=129
#
# Both commands together take 10 to 20 seconds on 2 CPU cores, and the second prints the rhyme. The data is ten
# copies of the rhyme: nine for training and the tenth for validation. So the validation loss, near 0.002, measures how
# well the model has memorised the rhyme, and says nothing about any other text.

out_dir = "out/humpty_dumpty"
dataset = "humpty_dumpty"

# the model: half the demo's layers and width
n_layer = 2
n_head = 2
n_embd = 64
block_size = 1280  # nearly all of the training data, so every block starts in the first line, not the similar second
position = "rotary"
activation = "relu_squared"
init = "zero"
tie_weights = False

# the training
batch_size = 1
max_iters = 120
learning_rate = 1e-2
warmup_iters = 10
eval_interval = 40
