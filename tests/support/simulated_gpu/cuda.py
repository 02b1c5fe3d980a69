"""torch.cuda in Python, for the simulated devices: what its CPU build has only as stubs."""

import contextlib
import ctypes
import types
from unittest import mock

import torch

DEVICES = 2
_CUDA = 1  # of c10::DeviceType
_HANDLES = 1000
PROPERTIES = types.SimpleNamespace(
    name="simulated",
    major=8,  # "auto" takes attention's CUDA kernels there: Triton's interpreter is slow
    minor=0,
    multi_processor_count=4,
    total_memory=2**32,
    warp_size=32,
    shared_memory_per_block_optin=227 * 1024,
    regs_per_multiprocessor=65536,
    gcnArchName="",
)

library: ctypes.CDLL


def _index(device=None):
    if isinstance(device, (str, torch.device)):
        device = torch.device(device).index
    return torch._C._accelerator_getDeviceIndex() if device is None else device


def _set_device(device):
    if (index := _index(device)) >= 0:
        torch._C._accelerator_setDeviceIndex(index)


def _exchange_device(index):
    before = _index()
    if index >= 0:
        torch._C._accelerator_setDeviceIndex(index)
    return before


def _maybe_exchange_device(index):  # torch._dynamo has to tell the two apart
    return _exchange_device(index)


class Event:
    def __init__(self, **_):
        self._clock = None

    def record(self, stream=None):
        self._drop()
        self._clock = library.simulated_record((stream or current_stream()).number)

    def wait(self, stream=None):
        (stream or current_stream()).wait_event(self)

    def synchronize(self):
        if self._clock is not None:
            library.simulated_host_waits(self._clock)

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0

    def _drop(self):
        if self._clock is not None:
            library.simulated_drop_event(self._clock)
            self._clock = None

    __del__ = _drop


class Stream(torch.Stream):
    def __new__(cls, device=None, priority=0, number=None):
        index = _index(device)
        if number is None:
            number = library.simulated_new_stream(index)
        stream_id = 0 if number < DEVICES else number  # a device's default stream has the id 0
        made = super().__new__(cls, stream_id=stream_id, device_index=index, device_type=_CUDA)
        made.number = number
        return made

    @property
    def cuda_stream(self):
        """A handle, as DLPack takes it: 0 is the default stream, 1 and 2 mean others to it."""
        return self.stream_id and _HANDLES + self.stream_id

    def __eq__(self, other):
        return isinstance(other, Stream) and self.number == other.number

    def __hash__(self):
        return self.number

    def query(self):
        return True

    def record_event(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        if event._clock is not None:
            library.simulated_wait(self.number, event._clock)

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.record_event().synchronize()


def current_stream(device=None):
    index = _index(device)
    return Stream(index, number=library.simulated_current_stream(index))


def _default_stream(device=None):
    index = _index(device)
    return Stream(index, number=index)


def _set_stream(stream):
    if stream is not None:
        library.simulated_set_stream(stream.device.index, stream.number)


@contextlib.contextmanager
def _stream(stream):
    """torch.cuda.stream."""
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device):
        before = current_stream()
        _set_stream(stream)
        try:
            yield
        finally:
            _set_stream(before)


_capturing = False


@contextlib.contextmanager
def capture():
    """As while a CUDA graph is captured: whatever waits for the device raises. The work is done at
    once, and there is nothing to replay."""
    global _capturing
    library.simulated_set_capturing(True)
    _capturing = True
    try:
        yield
    finally:
        _capturing = False
        library.simulated_set_capturing(False)


def waits() -> int:
    """How often the host has waited for a device."""
    return library.simulated_waits()


def last_wait() -> str:
    return library.simulated_last_wait().decode()


def faults() -> str:
    """Faults since the last question: writes outside of allocations, races of streams."""
    return library.simulated_take_faults().decode()


def device_of(address: int) -> int:
    """The number of the device that an address lies on; -1: none."""
    return library.simulated_device_of(address)


def install(path: str) -> None:
    """Gives torch the devices of the library, which was loaded before torch was."""
    global library
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name, result, *arguments in (
        ("waits", ctypes.c_long),
        ("last_wait", ctypes.c_char_p),
        ("take_faults", ctypes.c_char_p),
        ("device_of", number, pointer),
        ("set_capturing", None, ctypes.c_bool),
        ("record", pointer, number),
        ("wait", None, number, pointer),
        ("host_waits", None, pointer),
        ("host_waits_for_all", None, number),
        ("drop_event", None, pointer),
    ):
        function = getattr(library, f"simulated_{name}")
        function.restype, function.argtypes = result, arguments

    def set_rng_state(state, device=None):
        torch.set_rng_state(state)

    replaced = dict(
        _initialized=True,
        _lazy_init=lambda: None,
        _exchange_device=_exchange_device,
        _maybe_exchange_device=_maybe_exchange_device,
        is_available=lambda: True,
        device_count=lambda: DEVICES,
        current_device=lambda: _index(),
        set_device=_set_device,
        get_device_capability=lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        get_device_name=lambda device=None: PROPERTIES.name,
        get_device_properties=lambda device=None: PROPERTIES,
        is_bf16_supported=lambda *args, **kwargs: True,
        is_current_stream_capturing=lambda: _capturing,
        current_stream=current_stream,
        default_stream=_default_stream,
        set_stream=_set_stream,
        stream=_stream,
        Stream=Stream,
        ExternalStream=lambda handle, device=None: Stream(device, number=handle - _HANDLES),
        Event=Event,
        synchronize=lambda device=None: library.simulated_host_waits_for_all(_index(device)),
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=set_rng_state,
        get_rng_state_all=lambda: [torch.get_rng_state()],
        default_generators=(torch.default_generator,) * DEVICES,
        manual_seed=torch.default_generator.manual_seed,
        mem_get_info=lambda device=None: (2**32, 2**32),
        memory_allocated=lambda device=None: 0,
        max_memory_allocated=lambda device=None: 0,
        memory_reserved=lambda device=None: 0,
        reset_peak_memory_stats=lambda device=None: None,
    )
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    for name, value in dict(
        _cuda_getCurrentRawStream=lambda index: current_stream(index).cuda_stream,
        _cuda_getDevice=lambda: _index(),
        _cuda_setDevice=lambda index: _set_device(index),  # torch._dynamo takes no function twice
        _cuda_getDeviceCount=lambda: DEVICES,
        _cuda_emptyCache=lambda: None,
        _broadcast_coalesced=_broadcast,
        _scatter=_scatter,
        _gather=_gather,
    ).items():
        setattr(torch._C, name, value)
    mock.patch.object(torch.UntypedStorage, "__new__", staticmethod(_new_storage)).start()


def _place(index):
    return torch.device("cuda", 0 if index is None else index)


# What nn.DataParallel does between devices.


def _broadcast(tensors, devices, buffer_size):
    return [[tensor.detach().to(_place(index)) for tensor in tensors] for index in devices]


def _scatter(tensor, devices, sizes, dim, streams):
    parts = tensor.chunk(len(devices), dim) if sizes is None else tensor.split(sizes, dim)
    return tuple(part.to(_place(index)) for part, index in zip(parts, devices, strict=False))


def _gather(tensors, dim, device):
    return torch.cat([tensor.to(_place(device)) for tensor in tensors], dim)


_storage_new = torch.UntypedStorage.__new__


def _new_storage(cls, *args, device=None, **kwargs):
    if device is not None and torch.device(device).type == "cuda":
        size = args[0] if args else 0
        return torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()
    if device is not None:
        kwargs["device"] = device
    return _storage_new(cls, *args, **kwargs)
