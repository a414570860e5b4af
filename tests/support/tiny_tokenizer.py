"""Real tokenizers of less than 1000 tokens, trained in a moment: byte-level, and Llama 2's kind."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpo_dist.data.tokens.templates import CHATML

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
MAX_VOCAB_SIZE = 600
_TEXTS = (
    "system\nYou are a helpful assistant.\nuser\nWhat is the color of the sky?\nassistant\n",
    "The sky is blue because air scatters short waves of light more than long ones.",
    "I do not know. Ask somebody else, please. The answer is yes, the answer is no.",
    "Name three animals: a cat, a dog and a horse. How many legs has a spider? Eight.",
    "Human: Hello! Assistant: Hello, how can I help you today? Good question. Sure, of course.",
)


def make_tokenizer(directory: Path, chat_template: str | None = CHATML) -> Path:
    """Writes a tokenizer folder: EOS and pad `<|im_end|>`, BOS `<|im_start|>`, never added."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=4096,
    )
    tokenizer.chat_template = chat_template
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    return directory


def sentencepiece_like(prepend_scheme: str, adds: str = "bos") -> PreTrainedTokenizerFast:
    """A tokenizer of Llama 2's kind, which writes a space before the text it is given.

    It adds "bos", "eos" or nothing ("").
    """
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    texts = ["The sky is blue.\nuser: yes", "<|user|> <|assistant|>", "The answer is no. answer"]
    backend.train_from_iterator(texts * 3, trainer)
    pattern = {"bos": "<s> $A", "eos": "$A </s>", "": "$A"}[adds]
    special_ids = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(pattern, special_tokens=special_ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
