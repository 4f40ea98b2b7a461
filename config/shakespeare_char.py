out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
