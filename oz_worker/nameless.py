"""Files without a name: what is handed to a child, whole, before it exists."""

from __future__ import annotations

import os


def nameless(data: bytes) -> int:
    """A descriptor at the start of a file without a name that holds *data*: it goes with the last who has it open.

    For what a child reads: all of it is there before the child is, so that our death never cuts it short. It stays in
    memory where the system has such files (Linux), else it lies unlinked in the directory for temporary files. Raises
    OSError.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("oz_worker")
    else:
        import tempfile  # not on the way of everybody else's start

        descriptor, path = tempfile.mkstemp()
        os.unlink(path)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
