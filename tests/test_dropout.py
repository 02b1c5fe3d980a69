"""The dropout mask: Philox itself, and the same bits from every implementation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bertfast.ops import attention, dropout, dropout_keep_mask, layer_norm

# Random123's published vectors for philox4x32: rounds, counters, key, words.
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
ONES = ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
ZEROS = ((0,) * 4, (0,) * 2)
PUBLISHED = [
    (10, *ZEROS, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, *ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    (7, *ZEROS, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, *ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
]


def numpy_philox(counters, key, rounds=7):
    """An implementation of its own, in uint64."""
    c = [np.uint64(v) for v in counters]
    k = [int(v) for v in key]
    for _ in range(rounds):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        low = np.uint64(0xFFFFFFFF)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            b & low,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            a & low,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return [int(v) for v in c]


def draw(seed, site, c0, c1, c2, k):
    key = (seed % 2**32, (seed >> 32) % 2**32)
    word = numpy_philox((c0, c1 % 2**32, c2 % 2**32, site), key)[k >> 1]
    return word >> 16 if k & 1 else word & 0xFFFF


@pytest.mark.parametrize(("rounds", "counters", "key", "words"), PUBLISHED)
def test_published_vectors_in_torch(rounds, counters, key, words):
    tensors = [torch.tensor([v]) for v in (*counters, *key)]
    ours = dropout.philox(tensors[:4], tensors[4:], rounds)
    assert tuple(int(word) for word in ours) == words
    assert tuple(numpy_philox(counters, key, rounds)) == words


@pytest.mark.host
@pytest.mark.parametrize(("rounds", "counters", "key", "words"), PUBLISHED[:3])
def test_published_vectors_in_the_cuda_sources(host_runtime, rounds, counters, key, words):
    assert host_runtime.philox10(*counters, *key) == words


@pytest.mark.triton
@pytest.mark.parametrize(("rounds", "counters", "key", "words"), PUBLISHED)
def test_published_vectors_in_triton(rounds, counters, key, words):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    import triton.language as tl

    @triton.jit
    def kernel(seed_ptr, counter_ptr, out_ptr, ROUNDS: tl.constexpr):
        c = tl.load(counter_ptr + tl.arange(0, 4)).to(tl.uint32)
        index = tl.arange(0, 4)
        c0 = tl.sum(tl.where(index == 0, c, 0)).to(tl.uint32)
        c1 = tl.sum(tl.where(index == 1, c, 0)).to(tl.uint32)
        c2 = tl.sum(tl.where(index == 2, c, 0)).to(tl.uint32)
        c3 = tl.sum(tl.where(index == 3, c, 0)).to(tl.uint32)
        zero = tl.zeros((1,), tl.uint32)
        words = tl.philox(
            tl.load(seed_ptr), zero + c0, zero + c1, zero + c2, zero + c3, n_rounds=ROUNDS
        )
        for i in tl.static_range(4):
            tl.store(out_ptr + i + tl.arange(0, 1), words[i].to(tl.int64))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = (key[1] << 32 | key[0]) - (2**64 if key[1] >= 2**31 else 0)
    out = torch.zeros(4, dtype=torch.int64, device=device)
    kernel[(1,)](
        torch.tensor([seed], device=device), torch.tensor(counters, device=device), out, rounds
    )
    assert tuple(out.tolist()) == words


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**62 + 12345])
def test_row_layout_is_as_written_down(seed):
    site, width = 3, 21
    rows = torch.tensor([0, 1, 5, 2**31 + 7, 2**40 + 3])
    for threshold in (1, 30000):
        mask = dropout.row_keep_mask(torch.tensor([seed]), site, rows, width, threshold)
        for i, row in enumerate(rows.tolist()):
            for column in range(width):
                bits = draw(seed, site, column >> 3, row, row >> 32, column & 7)
                assert mask[i, column] == (bits >= threshold)


def test_attention_layout_is_as_written_down():
    seed, site, p, shape = -77, 9, 0.4, (2, 3, 37, 70)
    mask = dropout_keep_mask(torch.tensor([seed]), site, shape, p, "attention")
    generator = np.random.default_rng(0)
    for _ in range(300):
        b, h, i, j = (int(generator.integers(extent)) for extent in shape)
        k = ((i >> 3) & 1) * 4 + ((j >> 3) & 3)
        c0, c1 = (j >> 5) << 3 | (j & 7), (i >> 4) << 3 | (i & 7)
        bits = draw(seed, site, c0, c1, b * shape[1] + h, k)
        assert mask[b, h, i, j] == (bits >= round(65536 * p))


def mask_of_kernel(target, dtype, rows, width, seed, site, p, row_index=None):
    """The mask that a kernel keeps: dx is zero exactly where it dropped."""
    backend, device = target
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.ones(width, dtype=dtype, device=device)
    residual = torch.randn(rows, width, generator=generator).to(device, dtype)
    y = layer_norm(
        x,
        weight,
        weight,
        residual=residual,
        dropout_p=p,
        seed=torch.tensor([seed], device=device),
        site=site,
        row_index=row_index,
        eps=1e-5,
        backend=backend,
    )
    dy = torch.randn(rows, width, generator=generator).to(device, dtype)
    return (torch.autograd.grad(y, x, dy)[0] != 0).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "seed", "site"),
    [(384, 5, 0), (768, -123456789012345, 2), (1024, 2**62, 2**31 - 1), (33, -1, 1), (1030, 9, 7)],
)
def test_kernels_draw_the_exported_mask(target, need, dtype, width, seed, site):
    need("layer_norm", target)
    expected = dropout_keep_mask(torch.tensor([seed]), site, (3, width), 0.5, "row")
    drawn = mask_of_kernel(target, dtype, 3, width, seed, site, 0.5)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [384, 41])
def test_row_index_draws_what_the_padded_batch_draws(target, need, dtype, width):
    need("layer_norm", target)
    lengths, padded = (5, 2, 7), 8
    index = torch.cat([torch.arange(n) + i * padded for i, n in enumerate(lengths)])
    whole = mask_of_kernel(target, dtype, len(lengths) * padded, width, 11, 4, 0.3)
    packed = mask_of_kernel(
        target, dtype, len(index), width, 11, 4, 0.3, row_index=index.to(target[1])
    )
    assert torch.equal(packed, whole[index])


def test_row_index_beyond_32_bits(target, need):
    need("layer_norm", target)
    index = torch.tensor([3, 2**31, 2**32 + 3, 2**45 + 1])
    seed = torch.tensor([1])
    expected = dropout.row_keep_mask(seed, 0, index, 64, dropout.threshold(0.5))
    drawn = mask_of_kernel(target, torch.float16, 4, 64, 1, 0, 0.5, index.to(target[1]))
    assert torch.equal(drawn, expected)
    assert not torch.equal(expected[0], expected[2])


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["row", "attention"])
def test_share_kept(p, kind):
    shape = (8, 4, 64, 128) if kind == "attention" else (2048, 128)
    mask = dropout_keep_mask(torch.tensor([42]), 0, shape, p, kind)
    keep = 1 - round(65536 * p) / 65536
    deviation = (keep * (1 - keep) / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - keep) <= 5 * deviation


@pytest.mark.parametrize("kind", ["row", "attention"])
def test_masks_of_neighbours_are_independent(kind):
    """Rows, columns, sites, seeds: agreement of two masks is a coin flip, within 5 deviations."""
    shape = (4, 4, 128, 128) if kind == "attention" else (512, 512)

    def mask(seed=1, site=0):
        return dropout_keep_mask(torch.tensor([seed]), site, shape, 0.5, kind)

    def check(a, b):
        agreement = (a == b).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / a.numel() ** 0.5

    check(mask(), mask(seed=2))
    check(mask(), mask(seed=1 + 2**32))
    check(mask(), mask(site=1))
    for distance in (1, 4, 8, 32):
        check(mask()[..., distance:], mask()[..., :-distance])
        check(mask()[..., distance:, :], mask()[..., :-distance, :])


def test_scale_is_the_inverse_of_the_share():
    for p in (0.1, 0.5, 0.999):
        threshold = dropout.threshold(p)
        assert dropout.keep_scale(threshold) * (1 - threshold / 65536) == pytest.approx(
            1, abs=1e-15
        )
    assert dropout.keep_scale(dropout.threshold(1.0)) == 0.0
    assert dropout.threshold(0.0) == 0


def test_everything_dropped_leaves_the_residual(target, need):
    need("layer_norm", target)
    backend, device = target
    x, residual = torch.randn(2, 3, 64, device=device)
    x[0, 0] = torch.nan
    one = torch.ones(64, device=device)
    dropped = layer_norm(x, one, one, residual=residual, dropout_p=1.0, backend=backend)
    assert torch.equal(dropped, layer_norm(residual, one, one, backend=backend))


def test_seed_is_drawn_from_torchs_generator(target, need):
    need("layer_norm", target)
    backend, device = target
    x, one = torch.randn(4, 64, device=device), torch.ones(64, device=device)

    def once():
        return layer_norm(x, one, one, dropout_p=0.5, backend=backend)

    torch.manual_seed(1)
    first, second = once(), once()
    torch.manual_seed(1)
    assert torch.equal(once(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("packed", [False, True])
def test_without_a_seed_torch_draws_on_a_cpu(packed):
    """Its own mask, where nobody else has to draw it: no seed, no mask of keys, "auto"."""
    q, k, v = torch.randn(3, 2, 7, 2, 8)
    inputs, layout = (q, k, v), {}
    if packed:
        inputs = [t.flatten(0, 1) for t in inputs]
        layout = dict(cu_seqlens=torch.tensor([0, 7, 14], dtype=torch.int32), max_seqlen=7)
    torch.manual_seed(3)
    out = attention(*inputs, dropout_p=0.4, **layout)
    torch.manual_seed(3)
    heads = (t.transpose(1, 2) for t in (q, k, v))
    least = round(0.4 * 65536) / 65536
    expected = F.scaled_dot_product_attention(*heads, dropout_p=least).transpose(1, 2)
    assert torch.equal(out, expected.flatten(0, 1) if packed else expected)
    seeded = attention(*inputs, dropout_p=0.4, seed=torch.tensor([3]), **layout)
    assert not torch.equal(seeded, out)


def test_a_padded_batch_draws_no_philox_on_a_cpu(monkeypatch):
    """Forward and backward of a converted model in training, packed, and padded by a mask."""
    pytest.importorskip("transformers")
    from support import hf_models

    import bertfast

    monkeypatch.setattr(dropout, "philox", lambda *_: pytest.fail("Philox was drawn"))
    for packed in (True, False):
        model = bertfast.optimize(hf_models.tiny(), packed=packed).train()
        model(**hf_models.batch())[0].sum().backward()
    seeded = dict(dropout_p=0.5, seed=torch.tensor([1]))
    with pytest.raises(pytest.fail.Exception, match="Philox was drawn"):
        attention(*torch.randn(3, 1, 4, 2, 8), **seeded)
