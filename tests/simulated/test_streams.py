"""Streams: work on one that doesn't wait for what it needs from another is found."""

import pytest
import torch


def test_what_a_stream_writes_must_be_waited_for(simulated_faults):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        x = torch.ones(4, device="cuda")
    x.sum()
    assert "stream 0 doesn't wait for what stream" in simulated_faults()
    torch.cuda.synchronize()


WAITS = {
    "wait_stream": lambda stream: torch.cuda.current_stream().wait_stream(stream),
    "event": lambda stream: torch.cuda.current_stream().wait_event(stream.record_event()),
    "synchronize": lambda stream: stream.synchronize(),
    "device": lambda stream: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_each_way_to_wait(name, simulated_faults):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.ones(4, device="cuda")
    WAITS[name](stream)
    x.sum()
    assert not simulated_faults()
    torch.cuda.synchronize()


def test_a_wait_for_another_device_is_none(simulated_faults):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.ones(4, device="cuda")
    torch.cuda.synchronize(1)
    x.sum()
    assert simulated_faults()
    torch.cuda.synchronize()


def test_a_write_to_what_may_still_be_read(simulated_faults):
    x, stream = torch.ones(4, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.sum()
    x.zero_()
    assert "stream 0 writes what" in simulated_faults()
    torch.cuda.synchronize()


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_freed_while_it_may_be_used(recorded, simulated_faults):
    x, stream = torch.ones(4, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.sum()
    if recorded:
        x.record_stream(stream)
    del x
    assert ("is freed while" in simulated_faults()) is not recorded


@pytest.mark.parametrize("stream_of_forward", ["default", "own"])
def test_backward_follows_its_forward(stream_of_forward):
    """autograd's own thread, on the stream of the forward."""
    w = torch.randn(4, 4, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream() if stream_of_forward == "own" else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss = (torch.ones(2, 4, device="cuda") @ w).square().sum()
    torch.cuda.current_stream().wait_stream(stream)
    loss.backward()
    stream.wait_stream(torch.cuda.current_stream())
    assert w.grad.isfinite().all()
