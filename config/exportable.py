# A recipe that transformers, llama.cpp and Ollama know: Llama's architecture. --minutes chooses its sizes.
#
#   python train.py config/exportable.py --input=FILE_OR_FOLDER --minutes=10
#   python export.py --out_dir=out/FILE_OR_FOLDER --to=exported

# the model
position = "rotary"
norm = "rmsnorm"
mlp = "gated"
activation = "silu"
mlp_conv = 0
qk_norm = False
init = "zero"
tie_weights = False

# the training, the same as in shakespeare_char.py
optimizer = "normuon"
learning_rate = 6e-3
muon_learning_rate = 0.03
muon_momentum = 0.85
beta2 = 0.95
schedule = "linear"
min_lr = 0.0
warmup_iters = 10
grad_clip = 0.0
