"""Views of a cache: every element where its layout says, and nothing copied."""

import pytest
import torch
from kernel_inputs import LAYOUTS
from triattention_kernels import ArgumentError, PagedKV, stack_layers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_find_every_element_where_its_layout_puts_it(layout, make_cache):
    cache = make_cache(layout, (2, 3, 2, 32, 48))
    kv = cache.kv
    for view, dense in zip((kv.keys, kv.values), cache.dense(), strict=True):
        assert torch.equal(view.reshape(dense.shape)[:, 1:], dense[:, 1:])
    assert (kv.num_layers, kv.num_blocks, kv.num_kv_heads) == (2, 3, 2)
    assert (kv.block_size, kv.head_dim) == (32, 48)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_through_the_views_writes_the_cache(layout, make_cache):
    cache = make_cache(layout, (2, 3, 2, 32, 32))
    cache.kv.keys.fill_(1.0)
    cache.kv.values.fill_(2.0)
    keys, values = cache.dense()
    assert (keys == 1.0).all()
    assert (values == 2.0).all()
    assert sorted(cache.blocks.unique().tolist()) == [1.0, 2.0]


def test_vec16_is_packed_like_vec(make_cache):
    blocks = make_cache("vec", (1, 2, 1, 16, 80)).blocks
    assert torch.equal(
        PagedKV.from_cpu_layout(blocks, "vec16").keys[:, 1:],
        PagedKV.from_cpu_layout(blocks, "vec").keys[:, 1:],
    )


def test_amx_packing_by_hand():
    block = torch.arange(2 * 16 * 16).view(1, 1, 1, 16, 32)
    kv = PagedKV.from_cpu_layout(block, "amx")
    key = kv.keys[0, 0, 0].reshape(16, 16)  # slot, dim
    assert key[0, :4].tolist() == [0, 1, 32, 33]
    assert key[1, :4].tolist() == [2, 3, 34, 35]
    value = kv.values[0, 0, 0].reshape(16, 16)
    assert value[0, :4].tolist() == [256, 258, 260, 262]
    assert value[1, :4].tolist() == [257, 259, 261, 263]
    assert value[2, :2].tolist() == [288, 290]


@pytest.mark.parametrize(("dtype", "group"), [(torch.bfloat16, 8), (torch.uint8, 16)])
def test_rocm_packing_by_offsets(dtype, group):
    """Per block all keys as [head, dim group, slot, dim of group], then all values as
    [head, dim, slot]."""
    num_blocks, num_heads, block_size, head_dim = 3, 2, 4, 32
    size = num_heads * block_size * head_dim
    storage = torch.randint(0, 256, (2, num_blocks, 2, size)).to(dtype)
    kv = PagedKV.from_rocm_layout(storage.view(2, num_blocks, 2, block_size, -1), num_heads)
    assert (kv.num_layers, kv.num_blocks, kv.num_kv_heads) == (2, num_blocks, num_heads)
    assert (kv.block_size, kv.head_dim) == (block_size, head_dim)
    keys = kv.keys.flatten(5).flatten(3, 4)  # layer, block, head, slot, dim
    values = kv.values.flatten(5).flatten(3, 4)
    for head, slot, dim in ((0, 0, 0), (0, 3, 7), (1, 2, 17), (1, 3, 31)):
        start = head * head_dim * block_size
        key = start + (dim // group * block_size + slot) * group + dim % group
        assert torch.equal(keys[:, :, head, slot, dim], storage[:, :, 0, key])
        assert torch.equal(
            values[:, :, head, slot, dim], storage[:, :, 1, start + dim * block_size + slot]
        )


def test_equally_spaced_layers_are_stacked_as_one_view_of_their_storage():
    storage = torch.zeros(3 * 40)
    layers = [storage[10 + 40 * idx : 34 + 40 * idx].view(2, 12)[:, :6] for idx in range(3)][:2]
    (stacked,) = stack_layers(layers)
    assert stacked.shape == (2, 2, 6)
    stacked[1, 1, 5] = 7.0
    assert layers[1][1, 5] == 7.0
    assert storage.count_nonzero() == 1


def test_one_layer_can_be_stacked():
    layer = torch.randn(2, 3)
    (stacked,) = stack_layers([layer])
    assert torch.equal(stacked[0], layer)
    assert stacked.data_ptr() == layer.data_ptr()


def test_other_layers_are_stacked_as_far_as_they_are_equally_spaced():
    storage, other = torch.arange(100.0), torch.arange(100.0, 200.0)
    starts = (0, 10, 20, 50, 40, 30, 30)
    layers = [storage[start : start + 4] for start in starts] + [other[30:34], other[34:38]]
    stacks = stack_layers(layers)
    assert [len(stack) for stack in stacks] == [3, 1, 1, 1, 1, 2]
    assert torch.equal(torch.cat(stacks), torch.stack(layers))
    assert {stack.untyped_storage().data_ptr() for stack in stacks} == {
        storage.data_ptr(),
        other.data_ptr(),
    }


def test_layers_that_are_not_alike_are_refused():
    storage = torch.zeros(100)
    with pytest.raises(ArgumentError, match="layer 1 has"):
        stack_layers([storage[0:4], storage[10:15]])
    with pytest.raises(ArgumentError, match="layer 1 has"):
        stack_layers([storage[0:8:2], storage[10:14]])
    with pytest.raises(ArgumentError, match="layer 1 has"):
        stack_layers([storage[0:4], storage.view(torch.int32)[10:14]])
    with pytest.raises(ArgumentError, match="no tensors"):
        stack_layers([])


def test_joined_caches_are_one_cache_of_all_their_layers(make_cache):
    caches = [make_cache("amx", (n, 3, 2, 16, 32), seed=n) for n in (2, 1)]
    kv = PagedKV.joined([cache.kv for cache in caches])
    assert (kv.num_layers, kv.num_blocks, kv.num_kv_heads) == (3, 3, 2)
    seen = [(layers.start, layers.stop) for layers, _ in kv.evenly_spaced()]
    assert seen == [(0, 2), (2, 3)]
    assert [part.num_layers for _, part in kv.evenly_spaced(1)] == [1, 1, 1]
    starts = kv.layer_starts * kv.layer_unit
    for row, name in zip(starts.tolist(), ("keys", "values"), strict=True):
        views = [
            getattr(cache.kv, name)[idx] for cache in caches for idx in range(cache.kv.num_layers)
        ]
        assert row == [view.data_ptr() - views[0].data_ptr() for view in views]


def test_caches_that_are_not_alike_are_not_joined(make_cache):
    caches = [make_cache("vec", (1, 3, heads, 16, 32)).kv for heads in (2, 4)]
    with pytest.raises(ArgumentError, match="cache 1 has .* join only caches that are alike"):
        PagedKV.joined(caches)
    with pytest.raises(ArgumentError, match="no caches"):
        PagedKV.joined([])


def test_blocks_of_a_wrong_shape_or_layout_are_refused():
    with pytest.raises(ArgumentError, match=r"2 \* D"):
        PagedKV.from_blocks(torch.zeros(1, 1, 1, 4, 7))
    with pytest.raises(ArgumentError, match="known are vec, vec16, amx"):
        PagedKV.from_cpu_layout(torch.zeros(1, 1, 1, 16, 32), "neon")
    with pytest.raises(ArgumentError, match="must be contiguous"):
        PagedKV.from_cpu_layout(torch.zeros(1, 1, 1, 32, 16).transpose(3, 4), "vec")
    with pytest.raises(ArgumentError, match="multiples of 16"):
        PagedKV.from_cpu_layout(torch.zeros(1, 1, 1, 16, 48), "amx")
    with pytest.raises(ArgumentError, match="D a multiple of 4"):
        PagedKV.from_rocm_layout(torch.zeros(1, 2, 2, 4, 12), 2)
    with pytest.raises(ArgumentError, match="7 dimensions"):
        PagedKV(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ArgumentError, match="keys and values differ"):
        PagedKV(torch.zeros(1, 2, 1, 4, 1, 4, 1), torch.zeros(1, 2, 1, 4, 1, 4, 1).double())
