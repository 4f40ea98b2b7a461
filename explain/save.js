/* The files in which a trained model leaves the page for Python. data.js and tokenizer.js are needed. */

/** The entries of best.pt, for torchSave(), as Run.state() in humptygpt/training/run.py makes them.

config: keys of ModelConfig. settings: keys of TrainConfig, at least those of TRAINING in humptygpt/page/page_data.py.
weights: a tree of {data: Float32Array, shape} under the names of a state dict; tied tensors have the same data.
progress: iter, at least 1; tokens; seconds; and best_val_loss if the model was evaluated. */
function checkpointOf({ config, settings, tokenizer: { alphabet, eot }, weights, progress }) {
  const { iter, seconds } = progress;
  const same = { position: iter, best_iter: iter, run_seconds: seconds };
  return {
    format: "gpt checkpoint 3",
    train_config: { out_dir: "out/playground", dataset: "playground", init_from: "scratch", ...settings },
    model_config: config,
    tokenizer: { tokenizer: "char", alphabet, separated: eot !== null },
    task: "language modelling",
    data: { source: "playground.txt", identity: {} },
    progress: { best_val_loss: Infinity, evals_since_best: 0, losses: [], ...same, ...progress },
    model: Object.fromEntries(namedTensors(weights)),
  };
}

function namedTensors(tree, names = []) {
  if (tree.shape) return [[names.join("."), tree]];
  return Object.entries(tree).flatMap(([name, part]) => namedTensors(part, [...names, name]));
}

/** The text of a config file that trains the same model on playground.txt.

defaults: {config, settings}, all keys of ModelConfig and TrainConfig. A setting that has its default is left out. */
function configFile({ config, settings, defaults }) {
  const { vocab_size, ...sizes } = defaults.config; // train.py counts the characters of the text
  const { max_iters, ...others } = defaults.settings; // without its length, train.py refuses to train on a text
  const lines = (values, standard) =>
    Object.entries(standard)
      .filter(([key, value]) => key in values && values[key] !== value)
      .map(([key]) => `${key} = ${pythonLiteral(values[key])}\n`)
      .join("");
  return `# A model of the playground. To train it in Python, put this file and playground.txt beside train.py:
#
#   python train.py playground.py
#   python sample.py --out_dir=out/playground

input = "playground.txt"
max_iters = ${settings.max_iters}

# the model
${lines(config, sizes)}
# the training
${lines(settings, others)}`;
}

/** Python writes True and False where JSON has true and false. */
const pythonLiteral = (value) => JSON.stringify(value).replace(/^[tf]/, (letter) => letter.toUpperCase());

// --------------------------------------------------------------------------------------
// The format of torch.save: a zip of a pickle and the numbers of each tensor. Bytes are characters up to U+00FF.

/** A file that torch.load() reads, as a Blob. value: plain data and tensors; tensors with the same data share them. */
function torchSave(value) {
  const storages = new Map(); // {data of tensors: its name}
  const pickle = `\x80\x02${pickled(value, storages)}.`; // protocol 2
  const numbers = ({ buffer, byteOffset, byteLength }) => new Uint8Array(buffer, byteOffset, byteLength);
  const tensors = Array.from(storages, ([data, name]) => [`data/${name}`, numbers(data)]);
  const texts = Object.entries({ "data.pkl": pickle, version: "3\n", byteorder: "little" });
  return zip([...texts.map(([name, text]) => [name, toBytes(text)]), ...tensors]);
}

const fromBytes = (bytes) => String.fromCharCode(...bytes);

/** Whole numbers as bytes, the lowest byte first. */
function integers(size, values) {
  const bytesOf = (value) => Array.from({ length: size }, (_, i) => Math.floor(value / 256 ** i) & 255);
  return fromBytes(values.flatMap(bytesOf));
}

const int16 = (...values) => integers(2, values);
const int32 = (...values) => integers(4, values);

/** The operations that make a value; Python's pickletools explains them. "(" begins the items that "t" makes a tuple,
"e" adds to a list and "u" to a dictionary. A whole number becomes an int, which Python accepts for a float, too. */
function pickled(value, storages) {
  const all = (...values) => values.map((each) => pickled(each, storages)).join("");
  if (value === null) return "N";
  if (typeof value === "boolean") return value ? "\x88" : "\x89";
  if (typeof value === "string") return `X${int32(utf8(value).length)}${utf8(value)}`;
  if (Number.isSafeInteger(value)) return `\x8a\x08${integers(8, [value])}`;
  if (typeof value === "number") return `G${fromBytes(new Uint8Array(Float64Array.of(value).buffer).reverse())}`;
  if (Array.isArray(value)) return `](${all(...value)}e`;
  if (!value.shape) return `}(${all(...Object.entries(value).flat())}u`;
  const { data, shape } = value;
  if (!storages.has(data)) storages.set(data, `${storages.size}`);
  const strides = shape.map((_, i) => sizeOf(shape.slice(i + 1)));
  const storage = `(${all("storage")}ctorch\nFloatStorage\n${all(storages.get(data), "cpu", data.length)}tQ`;
  return `ctorch._utils\n_rebuild_tensor_v2\n(${storage}${all(0)}(${all(...shape)}t(${all(...strides)}t\x89NtR`;
}

/** A zip of these files, not compressed. files: [[name, bytes], ...] */
function zip(files) {
  const [parts, directory] = [[], []];
  let at = 0;
  for (const [name, bytes] of files) {
    const path = `best/${name}`;
    const sizes = int32(crc32(bytes), bytes.length, bytes.length);
    const about = `${int16(20, 0, 0, 0, 33)}${sizes}${int16(path.length, 0)}`; // version 2.0, of 1980-01-01
    const header = `PK\x03\x04${about}${path}`;
    directory.push(`PK\x01\x02${int16(20)}${about}${int16(0, 0, 0)}${int32(0, at)}${path}`);
    parts.push(toBytes(header), bytes);
    at += header.length + bytes.length;
  }
  const entries = directory.join("");
  const end = `PK\x05\x06${int16(0, 0, files.length, files.length)}${int32(entries.length, at)}${int16(0)}`;
  return new Blob([...parts, toBytes(entries + end)]);
}
