"""A metric of a user, in its own file. The tests name it dark_pixels:DarkPixels."""

import time
from pathlib import Path

from mi_ray.alignment.metric import Column, Metric, details_of


class DarkPixels(Metric):
    columns = (
        Column("dark_pixels", "number of pixels darker than half", "pixels", 0, 64 * 64, higher_is_better=False),
        Column("darkest", "the darkest pixel's mean of red, green and blue", low=0, high=255),
    )

    def measure(self, images, prompts):
        brightness = images.mean(-1)  # (n, h, w)
        return {"dark_pixels": (brightness < 128).sum((1, 2)), "darkest": brightness.min((1, 2))}


class NoMetric:
    columns = ()


class NeedsAPath(DarkPixels):
    def __init__(self, path):
        self.path = path


class Exact(Metric):
    """A metric whose column has the same name as a column of the oracle."""

    columns = (Column("exact", "something else"),)

    def measure(self, images, prompts):
        return {"exact": [1.0] * len(prompts)}


class Wanted(Metric):
    """A metric that needs a column of the prompt set: the number of objects in `include`."""

    columns = (Column("wanted", "number of objects that the prompt set names"),)
    reads_only = "prompts with the column `include`"

    def reads(self, prompt):
        return "include" in details_of(prompt)

    def measure(self, images, prompts):
        return {"wanted": [len(details_of(prompt)["include"]) for prompt in prompts]}


class Patient(DarkPixels):
    """Measures the first prompt only after a file exists, which is the text after @."""

    def __init__(self, file):
        self.file = Path(file)

    def measure(self, images, prompts):
        until = time.monotonic() + 60
        while prompts[0] == "prompt 0" and not self.file.exists():
            if time.monotonic() > until:
                raise TimeoutError("the actor has not begun the next shard")
            time.sleep(0.05)
        return super().measure(images, prompts)
