"""[Ray Train] Which way gloo goes from host to host.

Left to itself gloo binds to whatever the host's name resolves to, which on Debian's kind of systems and in many
containers is 127.0.1.1: ranks on other hosts then cannot reach it. The way that Ray itself goes is known to work.
"""

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915  # man 7 netdevice


def torch_config(backend: str, timeout_s: int):
    """Ray Train's TorchConfig, whose ranks take Ray's way to each other where they are on several hosts."""
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    class Backend(_TorchBackend):
        def on_start(self, worker_group, backend_config) -> None:
            from ray.util import get_node_ip_address

            if len(set(worker_group.execute(get_node_ip_address))) > 1:
                worker_group.execute(choose)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self):
            return Backend

    return Config(backend=backend, timeout_s=timeout_s)


def choose() -> None:
    """Sets GLOO_SOCKET_IFNAME to the interface of this node's address in Ray, if there is one and it is not set."""
    from ray.util import get_node_ip_address

    if name := interface(get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface(address: str) -> str | None:
    """The name of the network interface with this IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(one, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no such address
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
