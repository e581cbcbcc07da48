"""Tokenizer of a ChatGLM2-6B as a checkpoint's own code has it: special tokens come after the pieces, and first in a prompt."""

import shutil
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizer

ADDED = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


class ChatGLMTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012  (transformers' way)
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012

    def __init__(self, vocab_file, padding_side="left", clean_up_tokenization_spaces=False, **kwargs):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        self.vocab_file = vocab_file
        self.added = {name: self.pieces.GetPieceSize() + index for index, name in enumerate(ADDED)}
        super().__init__(
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    unk_token = pad_token = "<unk>"
    eos_token = "</s>"
    pad_token_id = 0
    eos_token_id = property(lambda self: self.pieces.eos_id())

    @property
    def vocab_size(self):
        return self.pieces.GetPieceSize() + len(ADDED)

    def get_vocab(self):
        return {self._convert_id_to_token(index): index for index in range(self.vocab_size)}

    def _tokenize(self, text, **kwargs):
        return self.pieces.EncodeAsPieces(text)

    def _convert_token_to_id(self, token):
        return self.added.get(token, self.pieces.PieceToId(token))

    def _convert_id_to_token(self, index):
        if index in self.added.values() or index in (0, 1, 2) or index < 0:
            return ""
        return self.pieces.IdToPiece(index)

    def _decode(self, token_ids, **kwargs):
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if any(index >= self.vocab_size for index in ids):
            raise IndexError("piece id is out of range")
        return self.pieces.DecodeIds([int(index) for index in ids if 2 < index < self.pieces.GetPieceSize()])

    def get_prefix_tokens(self):
        return [self.added["[gMASK]"], self.added["sop"]]

    def build_prompt(self, query, history=None):
        turns = [*(history or []), (query, "")]
        text = "".join(
            f"[Round {i}]\n\n问：{asked}\n\n答：{answer}\n\n" for i, (asked, answer) in enumerate(turns, 1)
        )
        return text.removesuffix("\n\n")

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        ids = [*self.get_prefix_tokens(), *token_ids_0]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        target = Path(save_directory) / self.vocab_files_names["vocab_file"]
        shutil.copyfile(self.vocab_file, target)
        return (str(target),)
