"""Tokenizer of a ChatGLM-6B as a checkpoint's own code has it: sentencepiece behind transformers' interface.

Specials that a text spells are recognised by transformers, as in the original.
"""

import re
import shutil
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizer

MAX_BLANKS = 80


class ChatGLMTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "ice_text.model"}  # noqa: RUF012  (transformers' way)
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012
    padding_side = "left"

    def __init__(  # noqa: PLR0917  (transformers' interface)
        self,
        vocab_file,
        bos_token="<sop>",
        eos_token="<eop>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="[MASK]",
        gmask_token="[gMASK]",
        **kwargs,
    ):
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            unk_token=unk_token,
            mask_token=mask_token,
            **kwargs,
        )
        self.vocab_file = vocab_file
        self.gmask_token = gmask_token
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))

    @property
    def vocab_size(self):
        return self.pieces.GetPieceSize()

    @property
    def gmask_token_id(self):
        return self.pieces.PieceToId(self.gmask_token)

    def get_vocab(self):
        return {self.pieces.IdToPiece(index): index for index in range(self.vocab_size)}

    def _tokenize(self, text, **kwargs):
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(f" {{2,{MAX_BLANKS}}}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return self.pieces.EncodeAsPieces(text)

    def _convert_token_to_id(self, token):
        return self.pieces.PieceToId(token)

    def _convert_id_to_token(self, index):
        return self.pieces.IdToPiece(index)

    def convert_tokens_to_string(self, tokens):
        return self._text_of([self.pieces.PieceToId(token) for token in tokens])

    def _text_of(self, ids):
        text = self.pieces.DecodeIds(ids)
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda mark: " " * int(mark[1]), text)

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs):
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        hidden = set(self.all_special_ids) if skip_special_tokens else {self.pad_token_id}
        text = self._text_of([index for index in ids if index not in hidden])
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        ids = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        target = Path(save_directory) / self.vocab_files_names["vocab_file"]
        shutil.copyfile(self.vocab_file, target)
        return (str(target),)
