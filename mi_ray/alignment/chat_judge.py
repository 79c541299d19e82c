"""Metrics that are the probability of an answer of a vision-language chat model of transformers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from mi_ray.alignment.judges import Judge, device
from mi_ray.alignment.metric import Unusable

if TYPE_CHECKING:
    from transformers import ProcessorMixin


class ChatJudge(Judge):
    """A metric by a chat model (Qwen3-VL, LLaVA ...) and its processor, in the precision of its weights."""

    default = "Qwen/Qwen3-VL-8B-Instruct"
    model_class = "AutoModelForImageTextToText"
    reader = "processor"
    batch_size = 8
    chat = None  # the model, loaded by `prepare`
    processor = None

    def prepare(self):
        """Load the model and the processor, once."""
        if self.chat is None:
            self.processor, self.chat = self.load_reader(), self.load("auto")
            self.processor.tokenizer.padding_side = "left"  # so that the answer follows the last position

    def load_reader(self) -> "ProcessorMixin":
        """The processor of the model. That of Qwen3-VL needs torchvision (extra `chat`).

        Raises:
            Unusable: as `Model.load_reader`; the model is no chat model for images.
        """
        processor = super().load_reader()
        if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
            raise Unusable(f"needs a model that reads images and texts, and {self.model!r} does not: give another")
        if not processor.chat_template:
            raise Unusable(f"needs a chat model, and {self.model!r} has no chat template: give another")
        return processor

    def probabilities(self, images: np.ndarray, questions: list[str], answers: list[Iterable[str]]) -> list[float]:
        """The probability that the first token of the answer begins one of the given spellings.

        Args:
            images: (n, h, w, 3) uint8.
            questions: n texts of the user.
            answers: n groups of spellings. The probabilities of their different first tokens are added.

        Returns:
            n probabilities in [0, 1], under the softmax over the whole vocabulary, without sampling temperature.
        """
        import torch
        from PIL import Image

        self.prepare()
        tokenizer, found = self.processor.tokenizer, []
        for rows in self.batches(len(questions)):
            chats = [
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
                for question in questions[rows]
            ]
            texts = self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
            begun = bool(tokenizer.bos_token) and texts[0].startswith(tokenizer.bos_token)
            inputs = self.processor(
                text=texts,
                images=[[Image.fromarray(image)] for image in images[rows]],
                padding=True,
                return_tensors="pt",
                add_special_tokens=not begun,
            )
            with torch.inference_mode():
                logits = self.chat(**inputs.to(device(), self.chat.dtype), logits_to_keep=1).logits[:, -1]
            for p, spellings in zip(logits.float().softmax(1).cpu(), answers[rows], strict=True):
                tokens = {tokenizer.encode(spelling, add_special_tokens=False)[0] for spelling in spellings}
                found.append(float(p[sorted(tokens)].sum()))
        return found
