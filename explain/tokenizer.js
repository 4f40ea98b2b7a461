/* Text -> token ids -> text, as humptygpt/tokenizers/basic.py and the libraries that it uses do it, step by step.

makeTokenizer(data) returns
  encode(text)    token ids; a character that has none is left out
  skipped(text)   the characters that are left out: char, and at, the number of tokens before it
  split(text)     how it came to them: the parts of the text that are encoded by themselves, each
                    symbols    what it starts with: characters, or single bytes
                    merges     the merges, in their order: at (number of the left symbol), piece (what the two become),
                               rank (the lowest is merged first; of equal ones the leftmost)
                    tokens     the result: piece and ids: none for a character that is left out, several for one that
                               is spelled in bytes
  decode(ids)     text; bytes that are not UTF-8 become U+FFFD
  pieces, vocab_size, eot, start    as in tokenizer.py
  encodeTurns(turns)    of a chat model, as in tokenizers/chat.py, with the beginning of a reply
Bytes are written as strings of characters up to U+00FF. Text is taken by code points: for..of and [...text]. */

/** The first n characters of a text, or n - 1, so that none of two UTF-16 units is cut in half. */
const beginning = (text, n) => text.slice(0, n).replace(/[\ud800-\udbff]$/, "");

const SPACE = "▁"; // sentencepiece's sign for a space

/** data: as from tokenizer_data() in humptygpt/page/page_data.py. */
function makeTokenizer(data) {
  const pieces = unpackPieces(data.pieces);
  const chats = data.eot !== null && decodeBytes([pieces[data.eot]]) === END;
  const begin = data.eot - 1; // of a chat model, the first token after those of its text
  const plain = TOKENIZERS[data.name](data, chats ? pieces.slice(0, begin) : pieces);
  const { split, encodeTurns } = chats ? chatTokenizer(plain, pieces, begin) : { split: plain };
  const lineBreak = pieces.findIndex((piece) => piece.length === 1 && piece[0] === 10);
  return {
    name: data.name,
    pieces,
    vocab_size: pieces.length,
    eot: data.eot,
    start: [chats ? begin : (data.eot ?? Math.max(lineBreak, 0))],
    split,
    encodeTurns,
    encode: (text) => idsIn(split(text)),
    skipped(text) {
      let at = 0;
      return split(text).flatMap(({ tokens }) =>
        tokens.flatMap(({ piece, ids }) => ((at += ids.length), ids.length ? [] : [{ char: piece, at }])),
      );
    },
    decode: (ids) => decodeBytes(ids.map((id) => pieces[id])),
  };
}

const idsIn = (parts) => parts.flatMap((part) => part.tokens.flatMap((token) => token.ids));

/** The bytes of each token. packed: all bytes in base64, and the length of each token. */
function unpackPieces({ bytes, lengths }) {
  const all = toBytes(atob(bytes));
  let end = 0;
  return lengths.map((length) => all.subarray(end, (end += length)));
}

function decodeBytes(pieces) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return pieces.map((piece) => decoder.decode(piece, { stream: true })).join("") + decoder.decode();
}

/** The bytes of a text in UTF-8, as a string of as many characters. Half of a pair of UTF-16 units becomes U+FFFD. */
function utf8(text) {
  return Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join("");
}

// --------------------------------------------------------------------------------------
// Characters and bytes

function charTokenizer({ alphabet }) {
  const ids = new Map([...alphabet].map((char, id) => [char, id]));
  const token = (char) => ({ piece: char, ids: ids.has(char) ? [ids.get(char)] : [] });
  return (text) => [{ symbols: [...text], merges: [], tokens: Array.from(text, token) }];
}

function byteTokenizer() {
  const token = (char) => ({ piece: char, ids: Array.from(utf8(char), (byte) => byte.charCodeAt(0)) });
  return (text) => [{ symbols: [...text], merges: [], tokens: Array.from(text, token) }];
}

// --------------------------------------------------------------------------------------
// Merges

/** Merge the pair of neighbours with the lowest rank, the leftmost of equal ones, until no pair has a rank.

rankOf(piece): undefined if the piece is no token. Returns the merges and the symbols that are left. */
function mergePairs(symbols, rankOf) {
  const [left, merges] = [[...symbols], []];
  const rank = (i) => (i >= 0 && i + 1 < left.length ? rankOf(left[i] + left[i + 1]) : undefined) ?? Infinity;
  const ranks = left.map((_, i) => rank(i)); // the rank of each symbol with the next one
  for (;;) {
    let at = 0;
    for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[at]) at = i;
    if (!(ranks[at] < Infinity)) return { merges, left };
    left.splice(at, 2, left[at] + left[at + 1]);
    merges.push({ at, piece: left[at], rank: ranks[at] });
    ranks.splice(at, 1);
    ranks[at] = rank(at);
    if (at) ranks[at - 1] = rank(at - 1);
  }
}

/** How GPT-2 splits text before byte pairs are merged. JavaScript's \s is not quite Unicode's white space. */
const GPT2_PATTERN = new RegExp(
  [
    /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+/u,
    /\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/u,
  ]
    .map((part) => part.source)
    .join("|"),
  "gu",
);

/** tiktoken's algorithm: a word that is a token stays whole, and any other word is merged from its bytes. */
function bytePairTokenizer(data, pieces) {
  const words = pieces.slice(0, -1); // the last is end-of-text
  const ids = new Map(words.map((piece, id) => [String.fromCharCode(...piece), id]));
  const encodeWord = (text) => {
    const word = utf8(text);
    const symbols = [...word];
    const { merges, left } = mergePairs(symbols, (piece) => ids.get(piece));
    const found = ids.has(word) ? [word] : left;
    return { symbols, merges, tokens: found.map((piece) => ({ piece, ids: [ids.get(piece)] })) };
  };
  return (text) => (text.match(GPT2_PATTERN) ?? []).map(encodeWord);
}

// --------------------------------------------------------------------------------------
// Sentencepiece

/** scores: by token, null for end-of-text and bytes, which text never becomes. byte_ids: tokens of bytes 0 to 255. */
function sentencePieceTokenizer({ scores, byte_ids }, pieces) {
  const ids = new Map();
  scores.forEach((score, id) => score !== null && ids.set(decodeBytes([pieces[id]]).replaceAll(" ", SPACE), id));
  const spelled = (piece) => ({ piece, ids: Array.from(utf8(piece), (byte) => byte_ids[byte.charCodeAt(0)]) });
  const token = (piece) => (ids.has(piece) ? { piece, ids: [ids.get(piece)] } : spelled(piece));
  const encodePart = encodeByMerges(ids, scores, token);
  return (text) =>
    text
      .split(/([\n▁])/)
      .filter((part) => part)
      .map((part) => {
        if (part === "\n") return { symbols: [part], merges: [], tokens: [token(part)] };
        // a "▁" of the text itself is spelled in bytes, otherwise it would become a space
        if (part === SPACE) return { symbols: [part], merges: [], tokens: [spelled(part)] };
        return encodePart(part.replaceAll(" ", SPACE));
      });
}

/** Byte-pair encoding over characters: the pair with the highest score is merged first. */
function encodeByMerges(ids, scores, token) {
  const rankOf = (piece) => (ids.has(piece) ? -scores[ids.get(piece)] : undefined);
  return (part) => {
    const symbols = [...part];
    const { merges, left } = mergePairs(symbols, rankOf);
    return { symbols, merges, tokens: left.map(token) };
  };
}

// --------------------------------------------------------------------------------------
// Conversations

const END = "<|im_end|>";
const MARKS = /(<\|im_start\|>|<\|im_end\|>)/;

/** Two marks and whole replies as further tokens. In a text, marks are recognised; in what somebody says, they are not.

split: of the text between marks. begin: id of <|im_start|>; <|im_end|> and the replies follow it. */
function chatTokenizer(split, pieces, begin) {
  const ids = new Map(pieces.slice(begin).map((piece, i) => [decodeBytes([piece]), begin + i]));
  const whole = (piece) => ({ symbols: [piece], merges: [], tokens: [{ piece, ids: [ids.get(piece)] }] });
  const splitTurn = (text) => {
    const [, header, reply] = text.match(/^(assistant\n)(.+)$/s) ?? [];
    return ids.has(reply) ? [...split(header), whole(reply)] : split(text);
  };
  const turn = ({ role, content }) => [begin, ...idsIn(splitTurn(`${role}\n${content}`))];
  return {
    split: (text) => text.split(MARKS).flatMap((part, i) => (i % 2 ? [whole(part)] : splitTurn(part))),
    encodeTurns(turns) {
      const said = turns.flatMap((each) => [...turn(each), begin + 1, ...idsIn(split("\n"))]);
      return [...said, ...turn({ role: "assistant", content: "" })];
    },
  };
}

const TOKENIZERS = {
  char: charTokenizer,
  byte: byteTokenizer,
  sentencepiece: sentencePieceTokenizer,
  gpt2: bytePairTokenizer,
  bpe: bytePairTokenizer,
};
