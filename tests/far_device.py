"""A second device, emulated on the CPU: `with far_device() as far: model.to('cuda') ...`.

Where a tensor lies is noted at its storage. The numbers are the CPU's: so are results, bit for bit. What
CUDA refuses is refused: operands on two devices, a generator or an index of the other one, numpy of what is far. Each
time that the host waits for the device is noted in `far.waits`, and an error inside `with far.state(patient=False):`.
Streams, pinned memory and sums in another order, which CUDA alone has, are not there, and of `torch.cuda` only the size
of the memory.
"""

from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, FAR = torch.device('cpu'), torch.device('cuda:0')
TENSOR, ATEN = torch.Tensor, torch.ops.aten
WAITS = {
    '_local_scalar_dense',
    'nonzero',
    'masked_select',
    'equal',
    'allclose',
    '_unique2',
    'bincount',
    '_linalg_check_errors',
}
FROM_HOST = torch.tensor, torch.as_tensor, torch.asarray, TENSOR.new_tensor
INDEXING = ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_


@contextmanager
def far_device(default=False):
    """Emulates the device inside; by `default` tensors are made there, as after `torch.set_default_device`."""
    far = FarDevice(default)
    patches = (
        (torch, 'Generator', Generator),
        (torch, 'autocast', Autocast),
        (torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=2**34)),
        (torch.autograd, '_engine_run_backward', far.seeing(torch.autograd._engine_run_backward)),
        (torch.distributed, 'all_reduce', as_nccl(torch.distributed.all_reduce)),
    )
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        with Operators(far), far:
            yield far


def tensors(values):
    return [v for v in tree_leaves(values) if isinstance(v, TENSOR)]


def is_far(tensor):
    return getattr(tensor.untyped_storage(), 'far', False)


def put(tensor, far):
    tensor.untyped_storage().far = far
    return tensor


def named_far(device):
    return torch.device(device).type == FAR.type


def real(device):
    return CPU if named_far(device) else device


def mixed(func):
    return RuntimeError(f'Expected all tensors to be on the same device, but found {FAR} and cpu! ({func})')


class FarDevice(TorchFunctionMode):
    """What Python asks of tensors: where they are, to be made or moved somewhere, and their numbers."""

    def __init__(self, default):
        super().__init__()
        self.default = default
        self.waits = []
        self.patient = True
        self.made_far = False  # where the results of operators without tensors are
        self.handling = False

    @contextmanager
    def state(self, **changed):
        before = {name: getattr(self, name) for name in changed}
        vars(self).update(changed)
        try:
            yield
        finally:
            vars(self).update(before)

    def wait(self, what):
        self.waits.append(str(what))
        if not self.patient:
            raise RuntimeError(f'called a synchronizing CUDA operation: {what}')

    def seeing(self, backward):
        """A backward pass whose Python code is seen too: torch leaves this mode while it handles a call."""

        def run(*args, **kwargs):
            left = self if self.handling else nullcontext()
            with self.state(handling=False), left:
                return backward(*args, **kwargs)

        return run

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch._C._nn._parse_to:  # which reads the arguments of Module.to
            return func(*args, **kwargs)
        given = tensors((args, kwargs))
        far = any(map(is_far, given))
        if func == TENSOR.device.__get__:
            return FAR if far else CPU
        if func == TENSOR.is_cuda.__get__:
            return far
        if far and func in (TENSOR.numpy, TENSOR.__array__):
            raise TypeError(f"can't convert {FAR} device type tensor to numpy. Use Tensor.cpu() first")
        if far and func is TENSOR.tolist:
            self.wait(func)
        with self.state(handling=True):
            if func in (TENSOR.to, TENSOR.cpu, TENSOR.cuda):
                return self.move(func, *args, **kwargs)
            if func is TENSOR.__deepcopy__:
                return put(func(*args, **kwargs), is_far(args[0]))
            return self.make(func, args, kwargs, given, far)

    def make(self, func, args, kwargs, given, far):
        device = kwargs.get('device')
        if device is None and self.default and not given and func in _device_constructors():
            device = FAR
        there = far if device is None else named_far(device)
        if device is not None:
            kwargs['device'] = real(device)
        generator = kwargs.get('generator')
        if generator is not None and getattr(generator, 'far', False) != there:
            raise RuntimeError(f'Expected a generator of {FAR if there else CPU} but found one of {generator.device}')
        with self.state(made_far=there):
            result = func(*args, **kwargs)
        if func in FROM_HOST:
            if there != far or (there and func is TENSOR.new_tensor):
                self.wait(f'{func} between host and device')
                result = result.clone()
            put(result, there)
        elif device is not None:
            put(result, there)
        return result

    def move(self, func, source, *asked, non_blocking=False, **kwargs):
        if func is not TENSOR.to:
            asked, kwargs['device'] = (), FAR if func is TENSOR.cuda else CPU
        there = is_far(source)
        for value in (*asked, *kwargs.values()):
            if isinstance(value, (torch.device, str)):
                there = named_far(value)
            elif isinstance(value, TENSOR):
                there = is_far(value)
            elif isinstance(value, bool):
                non_blocking |= value
        asked = [real(v) if isinstance(v, (torch.device, str)) else v for v in asked]
        if kwargs.get('device') is not None:
            kwargs['device'] = real(kwargs['device'])
        result = source.to(*asked, **kwargs)
        if there == is_far(source):
            return result
        if not there or not non_blocking:
            self.wait(f'copy to the {"device" if there else "host"}')
        return put(result.clone(), there)


class Operators(TorchDispatchMode):
    """Every operator: those of a backward pass and within other functions too."""

    def __init__(self, far):
        super().__init__()
        self.far = far

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        far = any(map(is_far, given))
        if far:
            self.check(func, args, kwargs, [t for t in given if not is_far(t)])
        result = func(*args, **kwargs)
        known = {t.untyped_storage()._cdata for t in given}
        for tensor in tensors(result):
            if tensor.untyped_storage()._cdata not in known:
                put(tensor, far if given else self.far.made_far)
        return result

    def check(self, func, args, kwargs, near):
        packet = func.overloadpacket
        if packet is ATEN.copy_:
            if near and (is_far(args[1]) or not (kwargs.get('non_blocking') or args[2:3] == (True,))):
                self.far.wait(f'{func} between host and device')
        elif packet in INDEXING:
            places = tensors(args[1])
            if not is_far(args[0]):
                raise RuntimeError('indices should be either on cpu or on the same device as the indexed tensor (cpu)')
            if any(t.ndim and not is_far(t) for t in tensors((args[2:], kwargs))):
                raise mixed(func)
            if any(not is_far(p) or p.dtype in (torch.bool, torch.uint8) for p in places):
                self.far.wait(func)
        elif any(t.ndim for t in near):
            raise mixed(func)
        elif packet.__name__ in WAITS:
            self.far.wait(func)


class Generator(torch.Generator):
    def __new__(cls, device='cpu'):
        self = super().__new__(cls)
        self.far = named_far(device)
        return self

    @property
    def device(self):
        return FAR if self.far else CPU


class Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__('cpu' if named_far(device_type) else device_type, *args, **kwargs)


def as_nccl(reduce):
    def run(tensor, *args, **kwargs):
        if not is_far(tensor):
            raise RuntimeError('No backend type associated with device type cpu')
        return reduce(tensor, *args, **kwargs)

    return run
