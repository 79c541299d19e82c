"""Metrics that are the probability of an answer of a vision-language chat model of transformers."""

from collections.abc import Iterable

import numpy as np

from mi_ray.alignment.judges import Judge, device
from mi_ray.alignment.metric import Unusable


class ChatJudge(Judge):
    """A metric by a chat model (Qwen3-VL, LLaVA ...) and its processor, in the precision of its weights."""

    default = "Qwen/Qwen3-VL-8B-Instruct"
    model_class = "AutoModelForImageTextToText"
    batch_size = 8
    chat = None  # the model, loaded by `prepare`
    processor = None

    def prepare(self):
        """Load the model and the processor, once.

        Raises:
            Unusable: the model is no chat model for images, or a library that its processor needs is missing.
        """
        if self.chat is None:
            from transformers import AutoProcessor

            try:
                self.processor = AutoProcessor.from_pretrained(**self.source)
                self.chat = self.load("auto")
            except (ImportError, OSError) as error:  # the processor of Qwen3-VL needs torchvision
                reason = " ".join(str(error).split())[:300]
                raise Unusable(
                    f"cannot load {self.model!r}: install what it needs, or complete it ({reason})"
                ) from error
            self.processor.tokenizer.padding_side = "left"  # so that the answer follows the last position

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
