"""OpenStack Swift with its S3 API, all of its servers in one process: `python swift_server.py FOLDER`.

Runs in an environment of its own (swift.txt), so it imports nothing of ours. Prints its address when it
listens; ends when its standard input does, so with whoever started it.
"""

import sys
from pathlib import Path

import eventlet  # type: ignore[import-not-found]  # only in the environment of its own

eventlet.monkey_patch()

from eventlet import tpool, wsgi  # noqa: E402  # after the patch
from swift.common import utils  # type: ignore[import-not-found]  # noqa: E402  # after the patch
from swift.common.ring import RingBuilder  # type: ignore[import-not-found]  # noqa: E402  # likewise
from swift.common.wsgi import loadapp  # type: ignore[import-not-found]  # noqa: E402  # likewise

STORING = ("account", "container", "object")
DEFAULT = """[DEFAULT]
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
log_level = ERROR
"""
SERVER = """
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
PROXY = """
[pipeline:main]
pipeline = catch_errors s3api tempauth bulk slo proxy-server
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
max_upload_part_num = 10000
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
"""


def serve(folder: Path) -> None:
    (folder / "devices/disk").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
    utils.set_swift_dir(str(folder))
    sockets = {kind: eventlet.listen(("127.0.0.1", 0)) for kind in (*STORING, "proxy")}
    ports = {kind: socket.getsockname()[1] for kind, socket in sockets.items()}
    for kind in STORING:
        builder = RingBuilder(part_power=1, replicas=1, min_part_hours=0)
        device = {"id": 0, "region": 1, "zone": 1, "device": "disk", "weight": 1}
        builder.add_dev({**device, "ip": "127.0.0.1", "port": ports[kind]})
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{kind}.ring.gz"))
    for kind, socket in sockets.items():
        path = folder / f"{kind}.conf"
        text = DEFAULT + (SERVER if kind in STORING else PROXY)
        path.write_text(text.format(folder=folder, kind=kind))
        eventlet.spawn(wsgi.server, socket, loadapp(str(path)), log_output=False)
    print(f"http://127.0.0.1:{ports['proxy']}", flush=True)  # noqa: T201  # for who started it
    tpool.execute(sys.stdin.read)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
