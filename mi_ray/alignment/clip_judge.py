"""Metrics that are a cosine between a prompt and an image in the space of a CLIP model."""

import numpy as np

from mi_ray.alignment.judges import Judge, Model, cropped, normalised


class Clip(Model):
    """transformers' CLIPModel and its tokenizer."""

    model_class = "CLIPModel"
    model_types = ("clip",)
    reader = "tokenizer"
    clip = None  # CLIPModel, loaded by `prepare`
    tokenizer = None

    def prepare(self):
        """Load the model and the tokenizer, once."""
        if self.clip is None:
            self.tokenizer, self.clip = self.load_reader(), self.load()


class ClipJudge(Clip, Judge):
    """A metric by CLIP. A subclass turns the cosine into its value."""

    def fitted(self, image: np.ndarray, size: int) -> np.ndarray:
        """An image (h, w, 3) uint8 as the (size, size, 3) that the vision model reads."""
        return cropped(image, size)

    def cosines(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """The cosine of each image and its prompt, (n,) fp32 in [-1, 1].

        A prompt longer than the text model's positions loses its last tokens; the end token stays, as in CLIP's own
        tokenizer with truncate=True.
        """
        import torch
        from torch.nn.functional import cosine_similarity

        self.prepare()
        clip, found = self.clip, []
        size = clip.config.vision_config.image_size
        longest = clip.config.text_config.max_position_embeddings
        for rows in self.batches(len(prompts)):
            texts = [self.template.format(prompt) for prompt in prompts[rows]]
            different = list(dict.fromkeys(texts))
            tokens = self.tokenizer(different, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            pixels = normalised([self.fitted(image, size) for image in images[rows]])
            with torch.inference_mode():
                of_text = clip.text_model(
                    input_ids=tokens["input_ids"].to(clip.device),
                    attention_mask=tokens["attention_mask"].to(clip.device),
                )
                text = clip.text_projection(of_text.pooler_output)[[different.index(text) for text in texts]]
                image = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
                found.append(cosine_similarity(image, text).float().cpu().numpy())
        return np.concatenate(found)
