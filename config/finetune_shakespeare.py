# Fine-tunes GPT-2 (124 million parameters) on tiny Shakespeare with GPT-2's own tokenizer. nanoGPT's file of the same
# name fine-tunes gpt2-xl instead.
#
#   python train.py config/finetune_shakespeare.py                    downloads 550 MB
#   python train.py config/finetune_shakespeare.py --lora_rank=8      needs less memory: see docs/models.md
#   python train.py config/finetune_shakespeare.py --init_from=out/x --dataset=mine      any other model and data
#
# It needs a GPU; a step takes minutes on 2 CPU cores. It has not been measured here, because the weights could not be
# downloaded.

out_dir = "out/finetune_shakespeare"
dataset = "shakespeare"
init_from = "gpt2"

batch_size = 1
gradient_accumulation_steps = 32  # 32,768 tokens per step, 9 steps per epoch
max_iters = 20
learning_rate = 3e-5
beta2 = 0.99
decay_lr = False

eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False
