"""The tokenizer of the recipes: byte-level BPE in which what retrieval is trained on is short.

    python benchmarks/recipes/tokenizer.py TEXT tokenizer.json [GROUP]

TEXT is a directory of text files (``text.py``), from which 2048 tokens are merged, bytes among them. Numbers are cut
into groups of up to GROUP (2) digits, each of them a token, and so is each of the words that facts are about
(``model/tasks/problem.py``) with the space before it: a key is one token, a number of seven digits four. The same text
and version of ``tokenizers`` give the same file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hsa_compile.model.checkpoint import write_text
from hsa_compile.model.data import read_text, text_files
from hsa_compile.model.tasks.problem import WORDS

MERGED, GROUP = 2048, 2
SPACE = "\u0120"  # how the byte-level alphabet writes a space
# Groups of digits, words and signs with the space before them, other white space.
PIECES = r"\p{{N}}{{1,{group}}}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\n|\s+(?!\S)|\s+"


def build(text: list[str], group: int = GROUP) -> str:
    """The file's content."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pieces = pre_tokenizers.Split(Regex(PIECES.format(group=group)), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=MERGED, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    data = json.loads(tokenizer.to_str())
    known = data["model"]["vocab"]
    # Pieces that are tokens are taken whole, whatever merges there are.
    numbers = [f"{i:0{width}}" for width in range(1, group + 1) for i in range(10**width)]
    for piece in (*numbers, *(SPACE + word for word in WORDS)):
        known.setdefault(piece, len(known))
    return json.dumps(data, ensure_ascii=False)


def main(text: Path, output: Path, group: int = GROUP) -> None:
    """Writes the file."""
    lines = [line for file in text_files(text) for line in read_text(file).decode().splitlines(keepends=True)]
    write_text(output, build(lines, group))
    tokenizer = Tokenizer.from_file(str(output))
    ids = sum(len(x.ids) for x in tokenizer.encode_batch_fast(lines))
    size = sum(len(line.encode()) for line in lines)
    print(f"{output}: {tokenizer.get_vocab_size()} tokens; {size / ids:.2f} bytes a token of this text")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
