"""Guards against waiting for the device: `with NoWait(): ...` on the CPU, `with SyncError(): ...` on a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoWait(TorchDispatchMode):
    """Fails where a program has to wait for the values of a tensor."""

    WAITS = (
        torch.ops.aten._local_scalar_dense.default,  # .item(), bool(), float(), tolist()
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.WAITS or (func is torch.ops.aten.index.Tensor and any(_is_mask(i) for i in args[1])):
            raise AssertionError(f'{func} waits for the device')
        return func(*args, **kwargs or {})


def _is_mask(index):
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class SyncError:
    """Fails where a program waits for a CUDA device."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode('error')

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode('default')
