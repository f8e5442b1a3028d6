"""Real parts for tests and benchmarks: brokers, stores, proxies and processes of one's own.

Every part runs on a free port of this machine's loopback, in a folder of its own that is removed
afterwards, and dies with the program that started it. ``MissingService`` is raised where the
machine lacks the program; the fixtures in ``tests/conftest.py`` turn that into a skip, or into a
failure under continuous integration.
"""

from lab.ports import free_port
from lab.processes import Process
from lab.proxy import TcpProxy
from lab.rabbit import RabbitNode
from lab.redis import RedisServer
from lab.s3 import S3Server
from lab.services import MissingService
from lab.wait import eventually, wait_until

__all__ = [
    "MissingService",
    "Process",
    "RabbitNode",
    "RedisServer",
    "S3Server",
    "TcpProxy",
    "eventually",
    "free_port",
    "wait_until",
]
