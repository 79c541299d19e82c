"""Conditioning: rows of all tensors are selected, joined, repeated and moved together."""

import pytest
import torch
import torch.distributed as dist

from mi_ray.diffusion.conditioning import Conditioning


@pytest.fixture
def three() -> Conditioning:
    """The conditioning of a family with a mask and a pooled vector."""
    embeds = torch.arange(24.0).view(3, 4, 2)
    return Conditioning({"embeds": embeds, "mask": torch.tensor([[1, 1, 0, 0]] * 3), "pooled": torch.eye(3)})


def equal(ours: Conditioning, theirs: Conditioning) -> bool:
    assert list(ours.tensors) == list(theirs.tensors)
    return all(torch.equal(ours[name], theirs[name]) for name in ours.tensors)


def test_rows_selects_the_same_rows_of_all_tensors(three):
    assert len(three) == 3
    picked = three.rows(torch.tensor([2, 0, 2, 2]))
    assert picked["embeds"].shape == (4, 4, 2)
    assert picked["mask"].shape == (4, 4)
    assert torch.equal(picked["pooled"], three["pooled"][[2, 0, 2, 2]])
    assert equal(three.rows(slice(1, 2)), three.rows(torch.tensor([1])))
    assert len(three.rows(torch.empty(0, dtype=torch.long))) == 0


def test_cat_joins_parts(three):
    parts = [three.rows(slice(0, 1)), three.rows(slice(1, 3))]
    assert equal(Conditioning.cat(parts), three)
    assert equal(Conditioning.cat(iter(parts)), three)


def test_expand_repeats_one_row_without_a_copy(three):
    one = three.rows(slice(1, 2))
    many = one.expand(5)
    assert len(many) == 5
    assert equal(many, one.rows(torch.zeros(5, dtype=torch.long)))
    assert many["embeds"].data_ptr() == one["embeds"].data_ptr()
    assert equal(three.expand(3), three)
    with pytest.raises(ValueError, match="of 3 prompts cannot be expanded to 5 rows"):
        three.expand(5)


def test_to_dtype_changes_only_floating_point_tensors(three):
    half = three.to(dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in half.tensors.items()} == {
        "embeds": torch.bfloat16,
        "mask": torch.int64,
        "pooled": torch.bfloat16,
    }
    elsewhere = three.to("meta")
    assert all(tensor.is_meta for tensor in elsewhere.tensors.values())
    assert elsewhere.rows(torch.tensor([0]))["embeds"].shape == (1, 4, 2)
    assert equal(three.cpu(), three)


def test_invalid_conditionings_are_refused(three):
    with pytest.raises(
        ValueError, match=r"has these tensors: embeds \(3, 2\), pooled \(2, 2\); give .* one row per prompt"
    ):
        Conditioning({"embeds": torch.zeros(3, 2), "pooled": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="no tensor"):
        Conditioning({})
    with pytest.raises(ValueError, match="with the tensors embeds and embeds, mask, pooled"):
        Conditioning.cat([three, Conditioning({"embeds": three["embeds"]})])
    longer = three.map(lambda tensor: torch.cat([tensor, tensor], 1))
    with pytest.raises(ValueError, match=r"rows of embeds with the shapes \(4, 2\) and \(8, 2\)"):
        Conditioning.cat([three, longer])


class Pooling(torch.nn.Module):
    """A network with a conditioning as argument."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, conditioning: Conditioning) -> torch.Tensor:
        return (conditioning["embeds"] @ self.weight * conditioning["mask"]).sum()


def test_conditioning_passes_through_data_parallel_training(three, tmp_path):
    alone, parallel = Pooling(), Pooling()
    alone(three).backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(parallel)(three).backward()
    finally:
        dist.destroy_process_group()
    assert torch.equal(alone.weight.grad, parallel.weight.grad)
