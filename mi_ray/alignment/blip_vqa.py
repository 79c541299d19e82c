"""BLIP-VQA of T2I-CompBench (Huang et al., NeurIPS 2023, arXiv 2307.06350)."""

import math
import re
from collections.abc import Callable

import numpy as np

from mi_ray.alignment.english import load_parser
from mi_ray.alignment.judges import Judge, device, normalised, resized
from mi_ray.alignment.metric import Column
from mi_ray.shapes.grammar import noun_phrase, parse

SIZE = 480  # height and width of the images in pixels; positions of models for other sizes are interpolated
MAX_CHUNKS, MAX_TOKENS = 8, 35
_NO_OBJECTS = ("top", "the side", "the left", "the right")  # noun chunks that are parts of relations


class BlipVqa(Judge):
    """The product of p(yes) over the noun chunks of the prompt: is each object, with its attributes, in the image?

    As in the released code (1b70949): the question is "{chunk}?" in lower case, without . ! " ( ) * # : ; ~, with [ENC]
    as first token, at most 35 tokens. p = p(yes) / (p(yes) + p(no)) of the first answer token after [DEC], rounded to 4
    decimals, and so is the product. At most 8 chunks count.

    Differences: a prompt without chunks has no value (there: 1). The grammar parses prompts of the shapes grammar.

    Raises:
        Unusable: also in `measure`, if spaCy or its model en_core_web_sm is missing and a prompt needs it.
    """

    default = "Salesforce/blip-vqa-capfilt-large"
    model_class = "BlipForQuestionAnswering"
    model_types = ("blip",)
    reader = "tokenizer"
    template = "{}?"
    declared = (
        Column(
            "blip_vqa",
            "BLIP-VQA: product over the noun phrases of the probability that the image shows them; null without any",
            "share",
            0,
            1,
            nullable=True,
        ),
    )
    blip = None  # BlipForQuestionAnswering, loaded by `prepare`
    tokenizer = None
    find_chunks: Callable[[str], list[str]] | None = None

    def prepare(self):
        """Load the model and the tokenizer, once."""
        if self.blip is None:
            self.tokenizer, self.blip = self.load_reader(), self.load()

    def reads(self, prompt: str) -> bool:
        """True for every prompt. It also loads the parser, so that a missing one is reported before a run starts."""
        self.questions(prompt)
        return True

    def questions(self, prompt: str) -> list[str]:
        """The questions about a prompt, at most `MAX_CHUNKS`."""
        try:
            spec = parse(prompt)
        except ValueError:
            if self.find_chunks is None:
                self.find_chunks = spacy_chunks()
            chunks = self.find_chunks(prompt)
        else:
            chunks = [noun_phrase(each, spec.numeric) for each in spec.objects]
        chunks = [chunk for chunk in chunks if chunk not in _NO_OBJECTS][:MAX_CHUNKS]
        return [re.sub(r'[.!"()*#:;~]', "", f"{chunk}?".lower()).rstrip(" ") for chunk in chunks]

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float | None]]:
        asked: dict[str, list[int]] = {}  # one question at a time: the texts of a batch need no padding
        for row, prompt in enumerate(prompts):
            for question in self.questions(prompt):
                asked.setdefault(question, []).append(row)
        answers: dict[int, list[float]] = {row: [] for row in range(len(prompts))}
        for question, owners in asked.items():
            for rows in self.batches(len(owners)):
                part = owners[rows]
                shares = self.p_yes([images[row] for row in part], [question] * len(part))
                for row, share in zip(part, shares, strict=True):
                    answers[row].append(round(share, 4))
        return {"blip_vqa": [round(math.prod(ps), 4) if ps else None for ps in answers.values()]}

    def p_yes(self, images: list[np.ndarray], questions: list[str]) -> list[float]:
        """p(yes) / (p(yes) + p(no)) for n images (h, w, 3) uint8 and their n questions."""
        import torch

        self.prepare()
        blip, text = self.blip, self.blip.config.text_config
        tokens = self.tokenizer(questions, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        ids, mask = (tokens[name].to(device()) for name in ("input_ids", "attention_mask"))
        ids[:, 0] = text.bos_token_id + 1  # [ENC]; [DEC] is bos
        pixels = normalised([resized(image, SIZE, SIZE) for image in images])
        yes_no = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        with torch.inference_mode():
            seen = blip.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
            question = blip.text_encoder(
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            ).last_hidden_state
            answer = blip.text_decoder(
                input_ids=torch.full((len(questions), 1), text.bos_token_id, device=seen.device),
                encoder_hidden_states=question,
                encoder_attention_mask=mask,
            ).logits[:, 0]
        return answer[:, yes_no].softmax(1)[:, 0].tolist()  # the other tokens cancel


def spacy_chunks() -> Callable[[str], list[str]]:
    """The texts of spaCy's noun chunks in a prompt, with their determiners.

    Raises:
        Unusable: as `load_parser`.
    """
    parser = load_parser("blip-vqa")
    return lambda prompt: [chunk.text for chunk in parser(prompt).noun_chunks]
